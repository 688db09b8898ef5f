"""Read small text files of the user; an error names the file, the place in it and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.utils.errors import ConfigError

# What reading JSON values raises where they are not as their writer made them, and reading their file as well.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
UNREADABLE = (OSError, *MALFORMED)
KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def read_text(path: Path, shown: str | None = None) -> str:
    """Return the text of a UTF-8 file; messages begin with what is `shown` for its path."""
    shown = shown or str(path)
    try:
        return path.read_text(encoding="utf-8-sig")
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
        raise ConfigError(f"{shown}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}: {error}") from None


def read_json_object(path: Path, **hooks: Any) -> dict[str, Any]:
    """Return the object in a JSON file."""
    value = read_json(path, **hooks)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {json_kind(value)}")
    return value


def json_kind(value: Any) -> str:
    """Return the name that JSON has for the type of a value."""
    return KINDS.get(type(value), "a number")
