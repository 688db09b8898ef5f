"""A strict JSON decoder, and what its markers mean.

`json` by itself accepts NaN, keeps the last of two equal keys, and raises at a number of more than 4,300 digits. This
decoder puts a marker into the value instead, so that a fault can name its place and the rest of the row is checked too.
"""

import ast
import json
from contextlib import suppress
from typing import Any

from finetune.utils.errors import shorten
from finetune.utils.user_files import SPACE


class _Constant(float):
    """Marks NaN or an infinity, which JSON does not have."""


class _LongNumber(int):
    """Marks a number with too many digits to be read."""


class _RepeatedKeys(dict[str, Any]):
    """Marks an object with repeated keys."""

    keys_repeated: tuple[str, ...] = ()


class Decoder:
    """A JSON decoder; `markers` counts those in the last value."""

    def __init__(self) -> None:
        self.markers = 0
        decoder: Any = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int
        )
        self._scan_once = decoder.scan_once

    def value(self, text: str, begin: int = 0) -> tuple[Any, int]:
        """Decode the value at `begin`, and where it ends; raises `JSONDecodeError` or `RecursionError`."""
        self.markers = 0
        try:
            return self._scan_once(text, begin)
        except StopIteration as stopped:
            raise json.JSONDecodeError("Expecting value", text, stopped.value) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) == len(pairs):
            return value
        self.markers += 1
        marker = _RepeatedKeys(value)
        keys = [key for key, _ in pairs]
        marker.keys_repeated = tuple(key for key in value if keys.count(key) > 1)
        return marker

    def _constant(self, name: str) -> float:
        self.markers += 1
        return _Constant(name)

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.markers += 1
            return _LongNumber()


def only_value(decoder: Decoder, text: str, begin: int) -> Any:
    """Decode a text that holds one value, which starts at `begin`; raises as `Decoder.value`."""
    value, end = decoder.value(text, begin)
    if end != len(text) and not is_blank(text[end:]):
        raise json.JSONDecodeError("content after the value", text, len(text) - len(text[end:].lstrip(SPACE)))
    return value


def decode_text(text: str) -> Any:
    """Decode a JSON text that a row holds as a string; raises `ValueError` or `RecursionError`."""
    decoder = Decoder()
    value = only_value(decoder, text, len(text) - len(text.lstrip(SPACE)))
    if decoder.markers:
        raise ValueError("; ".join(fault.lstrip(", :") for fault in mark_faults(value, "")))
    return value


def json_text(value: Any) -> str:
    """A JSON value as text; of a table also dates and the like, as Python shows them."""
    return json.dumps(value, ensure_ascii=False, default=str)


def decode_literal(text: str) -> Any:
    """Decode a JSON text, or a Python literal, as tables and some data have it; raises as `decode_text`."""
    try:
        return decode_text(text)
    except ValueError:
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return decode_text(json.dumps(ast.literal_eval(text.strip()), ensure_ascii=False))
        raise


def mark_faults(value: Any, place: str) -> list[str]:
    """A complete message for each marker in the value of a row."""
    faults = []
    stack: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while stack:
        node, path = stack.pop()
        if isinstance(node, _Constant):
            name = {"inf": "Infinity", "-inf": "-Infinity"}.get(repr(float(node)), "NaN")
            faults.append(f"{place}{_path(path)}: holds {name}, which is not JSON: write null, or leave it out")
        elif isinstance(node, _LongNumber):
            faults.append(f"{place}{_path(path)}: holds a number of more than 4,300 digits: write it as a string")
        elif isinstance(node, _RepeatedKeys):
            keys = ", ".join(shown(key) for key in node.keys_repeated)
            faults.append(f"{place}{_path(path)}: has {keys} twice: only one of them could be read, take one out")
        if isinstance(node, dict):
            stack.extend((child, (*path, key)) for key, child in reversed(node.items()))
        elif isinstance(node, list):
            stack.extend((child, (*path, index)) for index, child in reversed([*enumerate(node)]))
    return faults


def _path(path: tuple[Any, ...]) -> str:
    if len(path) > 1 and path[0] in ("conversations", "messages", "conversation") and isinstance(path[1], int):
        return "".join([f", turn {path[1]}", *(f", {shown(key)}" for key in path[2:5])])
    return "".join(f", {shown(key)}" for key in path[:4])


def shown(value: Any) -> str:
    """Format a value for a message: as JSON, on one line, at most 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: f"({type(other).__name__})")
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return shorten(text.encode("utf-8", "backslashreplace").decode())


def line_and_column(text: str, pos: int) -> tuple[int, int]:
    """Line and column of a position in a text, both from 1."""
    return text.count("\n", 0, pos) + 1, pos - text.rfind("\n", 0, pos)


def is_blank(text: str) -> bool:
    """Whether the text is white space, as JSON has it."""
    return not text.strip(SPACE)
