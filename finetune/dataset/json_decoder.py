"""JSON as it stands in a file: one decoder that lets nothing pass in silence, and words for what is wrong with a text.

`json` by itself reads NaN, keeps the last of two equal keys, and stops at a number of more than 4,300 digits. Here each
of them leaves a mark in the value, so that a fault can name its place and the rest of the row is still looked at.
"""

from __future__ import annotations

import json
from typing import Any

SPACE = " \t\r\n"
SHOWN_CHARACTERS = 60


class _Constant(float):
    """NaN or an infinity, which JSON does not have."""


class _LongNumber(int):
    """0 in the place of a number with too many digits to be read."""


class _Repeated(dict):
    """An object in which a key stands twice."""

    again: tuple[str, ...] = ()


class Decoder:
    """A JSON decoder; `marks` counts what the last call found that is no fault of syntax but no value either."""

    def __init__(self) -> None:
        self.marks = 0
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._int
        )

    def value(self, text: str, begin: int = 0) -> tuple[Any, int]:
        """The value that begins at `begin`, and where it ends.

        Raises:
            json.JSONDecodeError: its `pos` counts in `text`.
            RecursionError: nested too deeply.
        """
        self.marks = 0
        try:
            return self._decoder.scan_once(text, begin)
        except StopIteration as stopped:
            raise json.JSONDecodeError("Expecting value", text, stopped.value) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            self.marks += 1
            found = _Repeated(found)
            keys = [key for key, _ in pairs]
            found.again = tuple(key for key in found if keys.count(key) > 1)
        return found

    def _constant(self, name: str) -> float:
        self.marks += 1
        return _Constant(name)

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.marks += 1
            return _LongNumber()


def mark_faults(value: Any, place: str) -> list[str]:
    """A complete message for each mark that the decoder left in a row."""
    faults = []
    waiting: list[tuple[Any, tuple[Any, ...]]] = [(value, ())]
    while waiting:
        one, path = waiting.pop()
        if isinstance(one, _Constant):
            name = {"inf": "Infinity", "-inf": "-Infinity"}.get(repr(float(one)), "NaN")
            faults.append(f"{place}{_path(path)}: holds {name}, which is not JSON: write null, or leave it out")
        elif isinstance(one, _LongNumber):
            faults.append(f"{place}{_path(path)}: holds a number of more than 4,300 digits: write it as a string")
        elif isinstance(one, _Repeated):
            again = ", ".join(shown(key) for key in one.again)
            faults.append(f"{place}{_path(path)}: has {again} twice: only one of them could be read, take one out")
        if isinstance(one, dict):
            waiting.extend((inner, (*path, key)) for key, inner in reversed(one.items()))
        elif isinstance(one, list):
            waiting.extend((inner, (*path, number)) for number, inner in reversed([*enumerate(one)]))
    return faults


def _path(path: tuple[Any, ...]) -> str:
    if len(path) > 1 and path[0] in ("conversations", "messages", "conversation") and isinstance(path[1], int):
        return "".join([f", turn {path[1]}", *(f", {shown(key)}" for key in path[2:5])])
    return "".join(f", {shown(key)}" for key in path[:4])


def shown(value: Any) -> str:
    """A value for a message: as JSON, on one line, at most 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=_type_name)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _type_name(value: Any) -> str:
    return f"({type(value).__name__})"


def reason(error: json.JSONDecodeError, text: str) -> str:
    """What is wrong at the place of a syntax error, and what to do, with a few characters of the text around it."""
    place = error.pos
    near = f"near {_around(text, place)}"
    here, before, after = text[place : place + 1], text[:place].rstrip(SPACE)[-1:], text[place + 1 :].lstrip(SPACE)[:1]
    if here and here in "]}" and before == "," or here == "," and after and after in "]}":
        return f"a comma before the closing bracket, {near}: take it out"
    if here == "'":
        return f"a single quote, {near}: JSON strings stand in double quotes"
    if text.startswith(("//", "/*", "#"), place):
        return f"a comment, {near}: JSON has none, take it out"
    if here == "\0":
        return f"a NUL character, {near}: was the file cut short by a crash or a full disk?"
    if error.msg.startswith("Unterminated string"):
        return f"a string that does not end, {near}: was the text cut off?"
    if not text[place:].strip(SPACE):
        return f"the text ends in the middle, {near}: was it cut off?"
    if error.msg.startswith("Invalid control character"):
        return f'a bare control character in a string, {near}: write it as an escape such as \\n or "\\u0001"'
    return f"{error.msg}, {near}"


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - 16) : place + 16].encode("utf-8", "backslashreplace").decode())


def position(text: str, place: int) -> tuple[int, int]:
    """Line and column of a place in a text, both from 1."""
    return text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)


def blank(text: str) -> bool:
    return not text.strip(SPACE)


def first_key(text: str) -> str | None:
    """The first key of an object of which only the beginning is there."""
    begin = text.find('"')
    if begin < 0 or not blank(text[:begin].lstrip(SPACE).removeprefix("{")):
        return None
    try:
        return json.JSONDecoder().raw_decode(text, begin)[0]
    except json.JSONDecodeError:
        return None
