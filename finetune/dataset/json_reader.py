"""Stream the rows of a JSON array, of JSON lines, or the one row of a single object.

An array is decoded value by value over a window of the text, so that a file of any size needs the memory of one row.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from finetune.dataset.data_files import CHUNK_BYTES, DataFile, UnreadableFileError, is_gb18030, wide_encoding
from finetune.dataset.json_decoder import Decoder, is_blank, line_and_column, mark_faults, only_value
from finetune.utils.user_files import SPACE, explain_error

MOST_CHARACTERS = 64 << 20
# A syntax error this near to the end of the window may disappear once more has been read.
NEAR_THE_END = 24
EXPECTED = "expected a JSON array of conversations, or one JSON object a line"
_BLANK_BYTES = SPACE.encode()
_LISTED_TURN = re.compile(rb"""(\xef\xbb\xbf)?\s*\[\s*\{\s*"(role|from)"\s*:""")  # a row is a list of turns
_SPACES = re.compile(f"[{SPACE}]*")


def _skip_spaces(text: str, start: int = 0) -> int:
    match = _SPACES.match(text, start)
    return match.end() if match else start


class RawRow(NamedTuple):
    """A decoded row; `faults` are complete messages, and there is no value unless `is_read`.

    `row` None: the file, or the rest of it, cannot be read.
    """

    row: int | None
    value: Any
    faults: list[str]
    is_read: bool = True


def iter_json_rows(file: DataFile) -> Iterator[RawRow]:
    """All rows in order; an error in a row becomes its fault.

    Raises:
        UnreadableFileError: the file, or the rest of it, cannot be read.
    """
    chunks = file.chunks()
    head = next(chunks, b"")
    while not head.removeprefix(codecs.BOM_UTF8).strip(_BLANK_BYTES) and (more := next(chunks, b"")):
        head += more
    encoding = wide_encoding(head)
    if encoding is not None:
        raise UnreadableFileError(f"{file.name}: {file.conversion(encoding)}")
    begin = head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK_BYTES)[:1]
    whole = chain([head], chunks)
    if not begin:
        raise UnreadableFileError(f"{file.name}: the file is empty: expected a JSON array of conversations")
    if begin == b"[" and b"\n[" in head and _LISTED_TURN.match(head) and _first_line_error(head) is None:
        yield from _line_rows(whole, file)
    elif begin == b"[":
        yield from _array_rows(_Window(whole, file))
    elif begin == b"{":
        error = _first_line_error(head)
        is_cut = error is not None and is_blank(error.doc[error.pos :])
        rows = _object_or_line_rows if is_cut else _line_rows
        yield from rows(whole, file)
    elif b"\n{" in head or (error := _first_line_error(head)) is None:
        yield from _line_rows(whole, file)
    else:
        place = f"{file.name}, line {error.lineno}, column {error.colno}"
        other = 'tables need a name in .csv or .tsv, and plain text is written as {"text": "..."}'
        raise UnreadableFileError(f"{place}: {EXPECTED}: {explain_error(error, error.doc)}; {other}")


def _first_line_error(head: bytes) -> json.JSONDecodeError | None:
    """The syntax error of the first line that is not blank; None if it has none, or is longer than the head."""
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace")
    begin = _skip_spaces(text)
    end = text.find("\n", begin)
    if end < 0 and len(head) >= CHUNK_BYTES:
        return None
    text = text if end < 0 else text[:end]
    try:
        only_value(Decoder(), text, begin)
    except json.JSONDecodeError as error:
        return error
    except RecursionError:
        return None  # nested too deeply: a fault of its own, reported where rows are read
    return None


class _Window:
    """A sliding window over a text; `text[at]` is the next character."""

    def __init__(self, chunks: Iterable[bytes], file: DataFile) -> None:
        self.file = file
        self.text, self.at = "", 0
        self._fault: str | None = None
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._lines_before = self._columns_before = self._bytes_before = 0

    def peek(self) -> str:
        """Skip white space; the next character, or the empty string at the end."""
        while True:
            self.at = _skip_spaces(self.text, self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def more(self) -> bool:
        """Drop what has been read, and at least double the rest; False at the end."""
        consumed, rest = self.text[: self.at], self.text[self.at :]
        line, column = line_and_column(consumed, len(consumed))
        self._columns_before = column - 1 + (self._columns_before if line == 1 else 0)
        self._lines_before += line - 1
        parts, length = [rest], 0
        while not length or length < len(rest):
            part = self._decode_chunk()
            if part is None:
                break
            parts.append(part)
            length += len(part)
        self.text, self.at = "".join(parts), 0
        return length > 0

    def fault(self) -> str | None:
        """Why the text stops before the end of the file; None if it does not."""
        return self._fault and f"{self.place(len(self.text))}: {self._fault}"

    def place(self, at: int) -> str:
        line, column = line_and_column(self.text, at)
        column += self._columns_before if line == 1 else 0
        return f"{self.file.name}, line {self._lines_before + line}, column {column}"

    def _decode_chunk(self) -> str | None:
        if self._fault is not None:
            return None
        chunk = next(self._chunks, None)
        try:
            part = self._decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            return self._text_before(error, len(chunk or b""))
        self._bytes_before += len(chunk or b"")
        return part if chunk is not None else None

    def _text_before(self, error: UnicodeDecodeError, chunk_bytes: int) -> str:
        begin = self._bytes_before - (len(error.object) - chunk_bytes)
        if is_gb18030(error.object[error.start : error.start + 4096]):
            self._fault = self.file.conversion("GB18030")
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
            fault = f"{window.place(error.pos)}: not JSON: {explain_error(error, window.text)}"
            raise UnreadableFileError(f"{fault}; row {row} and what follows cannot be read") from None
        except _NotText as error:
            raise UnreadableFileError(f"{error}; row {row} and what follows cannot be read") from None
        except (RecursionError, TooLongError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            fault = f"{window.place(window.at)}: row {row} is {why}"
            raise UnreadableFileError(f"{fault}; it and what follows cannot be read") from None
        yield RawRow(row, value, mark_faults(value, f"{window.file.name}, row {row}") if decoder.markers else [])
        row += 1
        delimiter = window.peek()
        closing = delimiter == "]"
        if not closing:
            between = _fault_between(window, delimiter)
            if between is not None:
                raise UnreadableFileError(f"{between}; what follows row {row - 1} cannot be read")
    window.at += 1
    if window.peek():
        extra = f"{window.place(window.at)}: not JSON: content after the closing bracket of the array"
        remedy = "one array a file, with all rows in it"
        raise UnreadableFileError(f"{extra}: {remedy}; what follows row {row - 1} cannot be read")
    if (unread := window.fault()) is not None:
        raise UnreadableFileError(unread)


def _fault_between(window: _Window, delimiter: str) -> str | None:
    """What is wrong between two rows of an array; moves past the comma if it is there."""
    if not delimiter:
        return window.fault() or f"{window.place(window.at)}: not JSON: the array does not end: was the file cut off?"
    if delimiter != ",":
        return f"{window.place(window.at)}: not JSON: expected a comma or the closing bracket, found {delimiter!r}"
    window.at += 1
    if window.peek() == "]":
        return f"{window.place(window.at)}: not JSON: a comma before the closing bracket: take it out"
    return None


class TooLongError(Exception):
    """A value that is too long to be a row."""


class _NotText(Exception):
    """The bytes that come next are not UTF-8; the message is complete."""


def _next_value(window: _Window, decoder: Decoder) -> Any:
    """Decode the value at `window.at`, and move past it."""
    while True:
        try:
            value, end = decoder.value(window.text, window.at)
        except json.JSONDecodeError as error:
            is_cut = error.pos >= len(window.text) - NEAR_THE_END or error.msg.startswith("Unterminated string")
            if not is_cut:
                raise
            if len(window.text) - window.at > MOST_CHARACTERS:
                raise TooLongError(f"longer than {MOST_CHARACTERS >> 20} Mi characters") from None
            before = window.at
            if window.more():
                continue
            if (fault := window.fault()) is not None:
                raise _NotText(fault) from None
            error.pos -= before
            raise
        # A number at the very end of the window may continue after it.
        if end == len(window.text) and isinstance(value, int | float) and window.more():
            continue
        window.at = end
        return value


def _object_or_line_rows(chunks: Iterable[bytes], file: DataFile) -> Iterator[RawRow]:
    """One object over several lines, else JSON lines of which the first is broken."""
    read: list[bytes] = []
    chunks = iter(chunks)

    def recorded() -> Iterator[bytes]:
        for chunk in chunks:
            read.append(chunk)
            yield chunk

    window = _Window(recorded(), file)
    window.peek()
    decoder = Decoder()
    try:
        value = _next_value(window, decoder)
    except TooLongError as error:
        found = f"one object {error}, beginning with {window.text[:40]!r}"
        raise UnreadableFileError(f"{file.name}: {found}: {EXPECTED}: write the list in it alone") from None
    except RecursionError:
        fault = f"{file.name}: one object over several lines, nested too deeply: {EXPECTED}"
        raise UnreadableFileError(fault) from None
    except (_NotText, json.JSONDecodeError) as error:
        if isinstance(error, json.JSONDecodeError) and is_blank(window.text[error.pos :]):
            fault = f"{window.place(error.pos)}: not JSON: {explain_error(error, window.text)}"
            raise UnreadableFileError(fault) from None
        yield from _line_rows(chain(read, chunks), file)
    else:
        yield RawRow(0, value, mark_faults(value, f"{file.name}, row 0") if decoder.markers else [])
        if window.peek():
            raise UnreadableFileError(f"{window.place(window.at)}: content after the object: {EXPECTED}")
        if (unread := window.fault()) is not None:
            raise UnreadableFileError(unread)


def byte_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        if others:
            yield b"".join(pieces)
            pieces = [others.pop()]
            yield from others
        elif sum(map(len, pieces)) > MOST_CHARACTERS:
            raise TooLongError(f"longer than {MOST_CHARACTERS >> 20} MiB")
    yield b"".join(pieces)


def _line_rows(chunks: Iterable[bytes], file: DataFile) -> Iterator[RawRow]:
    decoder, name, row, number, offset, is_utf_8 = Decoder(), file.name, 0, 0, 0, False
    try:
        for number, line in enumerate(byte_lines(chunks), start=1):
            offset += len(line) + 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip(_BLANK_BYTES):
                continue
            try:
                text = line.decode()
                is_utf_8 = is_utf_8 or not text.isascii()
                value = only_value(decoder, text, 0 if text[0] == "{" else _skip_spaces(text))
            except UnicodeDecodeError as error:
                if not is_utf_8 and is_gb18030(line[error.start : error.start + 4096]):
                    raise UnreadableFileError(f"{name}: {file.conversion('GB18030')}") from None
                byte = offset - 1 - len(line) + error.start
                yield RawRow(row, None, [f"{name}, row {row}, line {number}: {_not_utf_8(byte)}"], is_read=False)
            except json.JSONDecodeError as error:
                place = f"{name}, row {row}, line {number}, column {error.pos + 1}"
                yield RawRow(row, None, [f"{place}: not JSON: {explain_error(error, text)}"], is_read=False)
            except RecursionError:
                yield RawRow(row, None, [f"{name}, row {row}, line {number}: nested too deeply"], is_read=False)
            else:
                yield RawRow(row, value, mark_faults(value, f"{name}, row {row}") if decoder.markers else [])
            row += 1
    except TooLongError as error:
        fault = f"{name}, line {number + 1}: {error}: {EXPECTED}"
        raise UnreadableFileError(f"{fault}; it and what follows cannot be read") from None
