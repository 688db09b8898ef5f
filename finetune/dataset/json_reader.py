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
_LISTED_TURN = re.compile(rb'\[\s*\{\s*"(role|from|content|value)"\s*:')  # a row is a list of turns
_NAME_OF_LINES = re.compile(r"\.(jsonl|ndjson)\b")
_SPACES = re.compile(f"[{SPACE}]*")


class RawRow(NamedTuple):
    """A decoded row; `faults` are complete messages, and there is no value unless `is_read`.

    `row` None: the file, or the rest of it, cannot be read.
    """

    row: int | None
    value: Any
    faults: list[str]
    is_read: bool = True


class TooLongError(Exception):
    """A value that is too long, or nested too deeply, to be a row."""


class _SyntaxFault(Exception):
    """What comes next is no JSON, or no UTF-8; the message is complete. `is_cut`: nothing stands behind that place."""

    def __init__(self, message: str, *, is_cut: bool = False) -> None:
        super().__init__(message)
        self.is_cut = is_cut


def iter_json_rows(file: DataFile) -> Iterator[RawRow]:
    """All rows in order; an error in a row becomes its fault.

    Raises:
        UnreadableFileError: the file, or the rest of it, cannot be read.
    """
    chunks = file.chunks()
    head = next(chunks, b"")
    while not (body := head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK_BYTES)) and (more := next(chunks, b"")):
        head += more
    if (encoding := wide_encoding(head)) is not None:
        raise UnreadableFileError(f"{file.name}: {file.conversion(encoding)}")
    if not body:
        raise UnreadableFileError(f"{file.name}: the file is empty: expected a JSON array of conversations")
    begin, whole, error = body[:1], chain([head], chunks), _first_line_error(head)
    has_lines = b"\n[" in head or _NAME_OF_LINES.search(file.name)  # an array alone in a file holds rows else
    if begin == b"[" and not (has_lines and _LISTED_TURN.match(body) and error is None):
        yield from _array_rows(_Window(whole, file))
    elif begin == b"{" and error is not None and is_blank(error.doc[error.pos :]):
        yield from _object_or_line_rows(whole, file)
    elif begin in (b"[", b"{") or b"\n{" in head or error is None:
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
    try:
        only_value(Decoder(), text if end < 0 else text[:end], begin)
    except json.JSONDecodeError as error:
        return error
    except RecursionError:
        return None  # nested too deeply: a fault of its own, reported where rows are read
    return None


def _skip_spaces(text: str, start: int = 0) -> int:
    match = _SPACES.match(text, start)
    return match.end() if match else start


class _Window:
    """A sliding window over a text; `text[at]` is the next character."""

    def __init__(self, chunks: Iterable[bytes], file: DataFile) -> None:
        self.file = file
        self.text, self.at = "", 0
        self._fault: str | None = None
        self._chunks = iter(chunks)
        self._utf_8, self._json = codecs.getincrementaldecoder("utf-8-sig")(), Decoder()
        self._lines_before = self._columns_before = self._bytes_before = 0

    def peek(self) -> str:
        """Skip white space; the next character, or the empty string at the end."""
        while True:
            self.at = _skip_spaces(self.text, self.at)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def row(self, row: int) -> RawRow:
        """Decode the value at `at`, and move past it; raises `TooLongError` or `_SyntaxFault`."""
        while True:
            begin = self.at
            try:
                value, end = self._json.value(self.text, begin)
            except RecursionError:
                raise TooLongError("nested too deeply") from None
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self.text) - NEAR_THE_END or error.msg.startswith("Unterminated string")
                if is_cut and len(self.text) - begin > MOST_CHARACTERS:
                    raise TooLongError(f"longer than {MOST_CHARACTERS >> 20} Mi characters") from None
                if is_cut and self._more():
                    continue
                if is_cut and (unread := self.fault()) is not None:
                    raise _SyntaxFault(unread) from None
                error.pos -= begin - self.at
                fault = f"{self.place(error.pos)}: not JSON: {explain_error(error, self.text)}"
                raise _SyntaxFault(fault, is_cut=is_blank(self.text[error.pos :])) from None
            # A number at the very end of the window may continue after it.
            if end == len(self.text) and isinstance(value, int | float) and self._more():
                continue
            self.at = end
            return _row(self.file, row, value, self._json)

    def fault(self) -> str | None:
        """Why the text stops before the end of the file; None if it does not."""
        return self._fault and f"{self.place(len(self.text))}: {self._fault}"

    def place(self, at: int) -> str:
        line, column = line_and_column(self.text, at)
        column += self._columns_before if line == 1 else 0
        return f"{self.file.name}, line {self._lines_before + line}, column {column}"

    def _more(self) -> bool:
        """Drop what has been read, and at least double the rest; False at the end."""
        consumed, rest = self.text[: self.at], self.text[self.at :]
        line, column = line_and_column(consumed, len(consumed))
        self._columns_before = column - 1 + (self._columns_before if line == 1 else 0)
        self._lines_before += line - 1
        parts, length = [rest], 0
        while (not length or length < len(rest)) and (part := self._decode_chunk()) is not None:
            parts.append(part)
            length += len(part)
        self.text, self.at = "".join(parts), 0
        return length > 0

    def _decode_chunk(self) -> str | None:
        """The text of the next chunk; None at the end of the file, or of what is UTF-8 in it."""
        if self._fault is not None:
            return None
        chunk = next(self._chunks, None)
        self._bytes_before += len(chunk or b"")
        try:
            part = self._utf_8.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            begin = self._bytes_before - len(error.object)  # which may begin in the chunk before
            self._fault = _not_utf_8(begin + error.start)
            if is_gb18030(error.object[error.start : error.start + 4096]):
                self._fault = self.file.conversion("GB18030")
            return error.object[: error.start].decode("utf-8-sig" if begin == 0 else "utf-8")
        return part if chunk is not None else None


def _not_utf_8(byte: int) -> str:
    return f"not UTF-8 at byte {byte}: convert it, for example with iconv"


def _row(file: DataFile, row: int, value: Any, decoder: Decoder) -> RawRow:
    return RawRow(row, value, mark_faults(value, f"{file.name}, row {row}") if decoder.markers else [])


def _array_rows(window: _Window) -> Iterator[RawRow]:
    window.peek()
    window.at += 1
    row, delimiter = 0, window.peek()
    while delimiter != "]":
        try:
            yield window.row(row)
        except TooLongError as error:
            fault = f"{window.place(window.at)}: row {row} is {error}"
            raise UnreadableFileError(f"{fault}; it and what follows cannot be read") from None
        except _SyntaxFault as error:
            raise UnreadableFileError(f"{error}; row {row} and what follows cannot be read") from None
        delimiter = window.peek()
        if delimiter != "]" and (between := _fault_between(window, delimiter)) is not None:
            raise UnreadableFileError(f"{between}; what follows row {row} cannot be read")
        row += 1
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
    try:
        yield window.row(0)
    except TooLongError as error:
        found = f"one object {error}, beginning with {window.text[:40]!r}"
        raise UnreadableFileError(f"{file.name}: {found}: {EXPECTED}: write the list in it alone") from None
    except _SyntaxFault as error:
        if error.is_cut:
            raise UnreadableFileError(str(error)) from None
        yield from _line_rows(chain(read, chunks), file)
        return
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
                fault = f": {_not_utf_8(offset - 1 - len(line) + error.start)}"
            except json.JSONDecodeError as error:
                fault = f", column {error.pos + 1}: not JSON: {explain_error(error, text)}"
            except RecursionError:
                fault = ": nested too deeply"
            else:
                fault = ""
                yield _row(file, row, value, decoder)
            if fault:
                yield RawRow(row, None, [f"{name}, row {row}, line {number}{fault}"], is_read=False)
            row += 1
    except TooLongError as error:
        fault = f"{name}, line {number + 1}: {error}: {EXPECTED}"
        raise UnreadableFileError(f"{fault}; it and what follows cannot be read") from None
