"""Read small text files of the user; an error names the file, the place in it and the remedy."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from finetune.utils.errors import ConfigError, missing_reason

# What reading JSON values raises where they are not as their writer made them, and reading their file as well.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
UNREADABLE = (OSError, *MALFORMED)
KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
SPACE = " \t\r\n"  # of JSON
MAX_DEPTH, MAX_INT = 20, 2**63
Made = TypeVar("Made")


def read_text(path: Path, shown: str | None = None) -> str:
    """Return the text of a UTF-8 file; messages begin with what is `shown` for its path."""
    shown = shown or str(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{shown}: {missing_reason(path)}") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: not UTF-8 at byte {error.start}: save it as UTF-8") from None


def read_json(path: Path, shown: str | None = None, **hooks: Any) -> Any:
    """Return the value in a JSON file; `hooks` are those of `json.loads`."""
    text, shown = read_text(path, shown), shown or str(path)
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError as error:
        place = f"{shown}, line {error.lineno}, column {error.colno}"
        reason = explain_error(error, error.doc) if text.strip() else "it is empty"
        raise ConfigError(f"{place}: not JSON: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}: {error}") from None


def explain_error(error: json.JSONDecodeError, text: str) -> str:
    """Explain a syntax error: what is wrong, the remedy, and a few characters of the text around it."""
    pos = error.pos
    around = text[max(0, pos - 16) : pos + 16].encode("utf-8", "backslashreplace").decode()
    near = f"near {around!r}"
    here, before, after = text[pos : pos + 1], text[:pos].rstrip(SPACE)[-1:], text[pos + 1 :].lstrip(SPACE)[:1]
    if here and here in "]}" and before == "," or here == "," and after and after in "]}":
        return f"a comma before the closing bracket, {near}: take it out"
    if here == "," and not after:
        return f"a comma behind the value, {near}: take it out"
    if here == "'":
        return f"a single quote, {near}: JSON strings stand in double quotes"
    if text.startswith(("//", "/*", "#"), pos):
        return f"a comment, {near}: JSON has none, take it out"
    if here == "\0":
        return f"a NUL character, {near}: was the file cut short by a crash or a full disk?"
    if error.msg.startswith("Unterminated string"):
        return f"a string that does not end, {near}: was the text cut off?"
    if not text[pos:].strip(SPACE):
        return f"the text ends in the middle, {near}: was it cut off?"
    if error.msg.startswith("Invalid control character"):
        return f'a bare control character in a string, {near}: write it as an escape such as \\n or "\\u0001"'
    return f"{error.msg}, {near}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, as a hook of `read_json`; a key that is given twice is a fault."""
    values = dict(pairs)
    if len(values) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f'the key "{key}" is given twice in one object: keep one of them')
    return values


def read_json_object(path: Path, **hooks: Any) -> dict[str, Any]:
    """Return the object in a JSON file."""
    value = read_json(path, **hooks)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {KINDS.get(type(value), 'a number')}")
    return value


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the object in a JSON text; None if it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def from_json(kind: type[Made], values: Mapping[str, Any], place: str) -> Made:
    """Build a dataclass from JSON values; a `TypeError` names the one that is missing, unknown or of another type."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints or not has_type(value, hints[name]):
            raise TypeError(f"{place} {shortened(name)[1:-1]} is {shortened(value)}")
    return kind(**values)


def has_type(value: Any, hint: Any, depth: int = 0) -> bool:
    """Whether a value from JSON has the type of a field, and numbers are finite."""
    if get_origin(hint) is UnionType:
        return any(has_type(value, part, depth) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, list | dict):
        kind, parts = get_origin(hint) or hint, get_args(hint) or (Any,)
        inner = value.values() if isinstance(value, dict) else value
        fits = (kind is Any or isinstance(value, kind)) and depth < MAX_DEPTH
        return fits and all(has_type(part, parts[-1], depth + 1) for part in inner)
    if hint is float:
        return type(value) in (int, float) and -math.inf < value < math.inf
    return hint is Any or (type(value) is hint and (hint is not int or abs(value) < MAX_INT))
