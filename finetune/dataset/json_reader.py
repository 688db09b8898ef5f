"""A stream of bytes -> the rows of a JSON array, of JSON lines, or the one row of a single object.

An array is decoded value by value over a window of the text, so that a file of any size needs the memory of one row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from finetune.dataset.data_files import CHUNK_BYTES, DataFile, conversion, is_gb18030, wide_encoding
from finetune.dataset.json_decoder import SPACE, Decoder, blank, first_key, mark_faults, position, reason

MOST_CHARACTERS = 64 << 20
# A syntax error this near to the end of the window may be none once more has been read.
NEAR_THE_END = 24
EXPECTED = "expected a JSON array of conversations, or one JSON object a line"
_BLANK_BYTES = SPACE.encode()
_SKIP = re.compile(f"[{SPACE}]*").match


class RawRow(NamedTuple):
    """A row as it stands in its file; `faults` are complete messages, without `is_read` there is no value.

    `row` None: the file, or the rest of it, cannot be read.
    """

    row: int | None
    value: Any
    faults: list[str]
    is_read: bool = True


def file_fault(fault: str) -> RawRow:
    """The row that stands for what cannot be read at all."""
    return RawRow(None, None, [fault], is_read=False)


def iter_json_rows(file: DataFile, name: str) -> Iterator[RawRow]:
    """All rows in order; what is wrong with the text becomes a row with faults.

    Raises:
        Unreadable: the packed stream is damaged.
    """
    chunks = file.chunks()
    head = next(chunks, b"")
    while not head.removeprefix(codecs.BOM_UTF8).strip(_BLANK_BYTES) and (more := next(chunks, b"")):
        head += more
    encoding = wide_encoding(head)
    if encoding is not None:
        yield file_fault(f"{name}: {conversion(encoding, name, file.packed)}")
        return
    begin = head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK_BYTES)[:1]
    whole = chain([head], chunks)
    if not begin:
        yield file_fault(f"{name}: the file is empty: expected a JSON array of conversations")
    elif begin == b"[":
        yield from _array_rows(_Window(whole, name, file.packed))
    elif begin == b"{":
        stop = _first_line_stops(head)
        rows = _object_or_line_rows if stop is not None and stop.at_the_end else _line_rows
        yield from rows(whole, name, file.packed)
    elif b"\n{" in head or (stop := _first_line_stops(head)) is None:
        yield from _line_rows(whole, name, file.packed)
    else:
        yield file_fault(stop.message(name))


class _Stop(NamedTuple):
    """Where the first line of a file stops being JSON."""

    error: json.JSONDecodeError
    text: str

    @property
    def at_the_end(self) -> bool:
        return blank(self.text[self.error.pos :])

    def message(self, name: str) -> str:
        line, column = position(self.text, self.error.pos)
        return f"{name}, line {line}, column {column}: {EXPECTED}: {reason(self.error, self.text)}"


def _first_line_stops(head: bytes) -> _Stop | None:
    """The first syntax error of the first line that is not blank; None where it is whole, or longer than the head."""
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace")
    begin = _SKIP(text).end()
    end = text.find("\n", begin)
    if end < 0 and len(head) >= CHUNK_BYTES:
        return None
    text = text if end < 0 else text[:end]
    try:
        _only_value(Decoder(), text, begin)
    except json.JSONDecodeError as error:
        return _Stop(error, text)
    except RecursionError:
        return None  # nested deeper than can be read: a fault of its own, found where rows are read
    return None


def _only_value(decoder: Decoder, text: str, begin: int) -> Any:
    value, end = decoder.value(text, begin)
    if end != len(text) and not blank(text[end:]):
        raise json.JSONDecodeError("content behind the value", text, _SKIP(text, end).end())
    return value


class _Window:
    """A part of a text that is read from its beginning to its end; `text[at]` is what comes next."""

    def __init__(self, chunks: Iterable[bytes], name: str, packed: bool) -> None:
        self.name, self.packed = name, packed
        self.text, self.at = "", 0
        self._fault: str | None = None
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._lines_before = self._columns_before = self._bytes_before = 0

    def peek(self) -> str:
        """The next character that is no white space; the empty string at the end."""
        while True:
            self.at = _SKIP(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def more(self) -> bool:
        """Drop what has been read, and at least double the rest; False where there is no more."""
        gone, rest = self.text[: self.at], self.text[self.at :]
        line, column = position(gone, len(gone))
        self._columns_before = column - 1 + (self._columns_before if line == 1 else 0)
        self._lines_before += line - 1
        parts, length = [rest], 0
        while not length or length < len(rest):
            part = self._decoded()
            if part is None:
                break
            parts.append(part)
            length += len(part)
        self.text, self.at = "".join(parts), 0
        return length > 0

    def fault(self) -> str | None:
        """Why the text stops where `peek` and `more` find no more of it; None where it simply ends."""
        return self._fault and f"{self.place(len(self.text))}: {self._fault}"

    def place(self, at: int) -> str:
        line, column = position(self.text, at)
        column += self._columns_before if line == 1 else 0
        return f"{self.name}, line {self._lines_before + line}, column {column}"

    def _decoded(self) -> str | None:
        if self._fault is not None:
            return None
        chunk = next(self._chunks, None)
        try:
            part = self._decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            return self._before_the_fault(error, len(chunk or b""))
        self._bytes_before += len(chunk or b"")
        return part if chunk is not None else None

    def _before_the_fault(self, error: UnicodeDecodeError, chunk_bytes: int) -> str:
        begin = self._bytes_before - (len(error.object) - chunk_bytes)
        if is_gb18030(error.object[error.start : error.start + 4096]):
            self._fault = conversion("GB18030", self.name, self.packed)
        else:
            self._fault = _not_utf_8(begin + error.start)
        return error.object[: error.start].decode("utf-8-sig" if begin == 0 else "utf-8")


def _not_utf_8(byte: int) -> str:
    return f"not UTF-8 at byte {byte}: convert it, for example with iconv"


def _array_rows(window: _Window) -> Iterator[RawRow]:
    window.peek()
    window.at += 1
    decoder, row, closing = Decoder(), 0, window.peek() == "]"
    while not closing:
        try:
            value = _next_value(window, decoder)
        except json.JSONDecodeError as error:
            fault = f"{window.place(error.pos)}: not JSON: {reason(error, window.text)}"
            yield file_fault(f"{fault}; row {row} and what follows cannot be read")
            return
        except _NotText as error:
            yield file_fault(f"{error}; row {row} and what follows cannot be read")
            return
        except (RecursionError, _TooLong) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            yield file_fault(f"{window.place(window.at)}: row {row} is {why}; it and what follows cannot be read")
            return
        yield RawRow(row, value, mark_faults(value, f"{window.name}, row {row}") if decoder.marks else [])
        row += 1
        behind = window.peek()
        closing = behind == "]"
        if not closing:
            fault = _fault_between(window, behind)
            if fault is not None:
                yield file_fault(f"{fault}; what follows row {row - 1} cannot be read")
                return
    window.at += 1
    if window.peek():
        fault = f"{window.place(window.at)}: not JSON: content behind the closing bracket of the array"
        yield file_fault(f"{fault}: one array a file, with all rows in it; what follows row {row - 1} cannot be read")
    elif (fault := window.fault()) is not None:
        yield file_fault(fault)
    elif not row:
        yield file_fault(f"{window.name}: holds no conversations")


def _fault_between(window: _Window, behind: str) -> str | None:
    """What is wrong between two rows of an array; moves behind the comma where it is none."""
    if not behind:
        return window.fault() or f"{window.place(window.at)}: not JSON: the array does not end: was the file cut off?"
    if behind != ",":
        return f"{window.place(window.at)}: not JSON: expected a comma or the closing bracket, found {behind!r}"
    window.at += 1
    if window.peek() == "]":
        return f"{window.place(window.at)}: not JSON: a comma before the closing bracket: take it out"
    return None


class _TooLong(Exception):
    """A value that is too long to be a row."""


class _NotText(Exception):
    """The bytes that come next are not UTF-8; the message is complete."""


def _next_value(window: _Window, decoder: Decoder) -> Any:
    """The value at `window.at`, which moves behind it."""
    while True:
        try:
            value, end = decoder.value(window.text, window.at)
        except json.JSONDecodeError as error:
            open_end = error.pos >= len(window.text) - NEAR_THE_END or error.msg.startswith("Unterminated string")
            if not open_end:
                raise
            if len(window.text) - window.at > MOST_CHARACTERS:
                raise _TooLong(f"longer than {MOST_CHARACTERS >> 20} Mi characters") from None
            before = window.at
            if window.more():
                continue
            if (fault := window.fault()) is not None:
                raise _NotText(fault) from None
            error.pos -= before
            raise
        # A number at the very end may go on behind it.
        if end == len(window.text) and isinstance(value, int | float) and window.more():
            continue
        window.at = end
        return value


def _object_or_line_rows(chunks: Iterable[bytes], name: str, packed: bool) -> Iterator[RawRow]:
    """One object over several lines, else JSON lines of which the first is broken."""
    read: list[bytes] = []
    chunks = iter(chunks)
    window = _Window((read.append(chunk) or chunk for chunk in chunks), name, packed)
    window.peek()
    decoder = Decoder()
    try:
        value = _next_value(window, decoder)
    except _TooLong as error:
        key = first_key(window.text[:1000])
        yield file_fault(
            f"{name}: one object {error}, which begins with the key {key!r}: {EXPECTED}: write the list in it alone"
        )
    except RecursionError:
        yield file_fault(f"{name}: one object over several lines, nested too deeply: {EXPECTED}")
    except _NotText:
        yield from _line_rows(chain(read, chunks), name, packed)
    except json.JSONDecodeError as error:
        if blank(window.text[error.pos :]):
            yield file_fault(f"{window.place(error.pos)}: not JSON: {reason(error, window.text)}")
        else:
            yield from _line_rows(chain(read, chunks), name, packed)
    else:
        yield RawRow(0, value, mark_faults(value, f"{name}, row 0") if decoder.marks else [])
        if window.peek():
            yield file_fault(f"{window.place(window.at)}: content behind the object: {EXPECTED}")
        elif (fault := window.fault()) is not None:
            yield file_fault(fault)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        if others:
            yield b"".join(pieces)
            pieces = [others.pop()]
            yield from others
        elif sum(map(len, pieces)) > MOST_CHARACTERS:
            raise _TooLong(f"longer than {MOST_CHARACTERS >> 20} MiB")
    yield b"".join(pieces)


def _line_rows(chunks: Iterable[bytes], name: str, packed: bool) -> Iterator[RawRow]:
    decoder, row, number, begin, is_utf_8 = Decoder(), 0, 0, 0, False
    try:
        for number, line in enumerate(_lines(chunks), start=1):
            begin += len(line) + 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip(_BLANK_BYTES):
                continue
            try:
                text = line.decode()
                is_utf_8 = is_utf_8 or not text.isascii()
                value = _only_value(decoder, text, 0 if text[0] == "{" else _SKIP(text).end())
            except UnicodeDecodeError as error:
                if not is_utf_8 and is_gb18030(line[error.start : error.start + 4096]):
                    yield file_fault(f"{name}: {conversion('GB18030', name, packed)}")
                    return
                place = begin - 1 - len(line) + error.start
                yield RawRow(row, None, [f"{name}, row {row}, line {number}: {_not_utf_8(place)}"], is_read=False)
            except json.JSONDecodeError as error:
                place = f"{name}, row {row}, line {number}, column {error.pos + 1}"
                yield RawRow(row, None, [f"{place}: not JSON: {reason(error, text)}"], is_read=False)
            except RecursionError:
                yield RawRow(row, None, [f"{name}, row {row}, line {number}: nested too deeply"], is_read=False)
            else:
                yield RawRow(row, value, mark_faults(value, f"{name}, row {row}") if decoder.marks else [])
            row += 1
    except _TooLong as error:
        yield file_fault(f"{name}, line {number + 1}: {error}: {EXPECTED}; it and what follows cannot be read")
