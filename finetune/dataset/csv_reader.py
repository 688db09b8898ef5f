"""Rows of CSV and TSV files: UTF-8, the names of the columns in the first line; streamed."""

import csv
from collections.abc import Iterator
from itertools import chain

from finetune.dataset.data_files import DataFile, UnreadableFileError, is_gb18030, wide_encoding
from finetune.dataset.json_decoder import shown
from finetune.dataset.json_reader import MOST_CHARACTERS, RawRow, TooLongError, byte_lines

DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = ",;\t|"
INDEX = "__index_level_0__"  # pandas' index: its name in Parquet, in CSV it has none
TWICE = "a quote inside a quoted cell is written twice"
# How an error of `csv` begins -> what it means.
_MEANINGS = {"unexpected end": f"a quoted cell does not end; {TWICE}", "new-line": "a line ends with \\r alone"}


def iter_csv_rows(file: DataFile, delimiter: str) -> Iterator[RawRow]:
    """All rows in order, cells as strings, empty ones as None; the faults have the line in which a row begins.

    If the first line has another delimiter instead of `delimiter`, that is the file's.

    Raises:
        UnreadableFileError: the file, or the rest of it, cannot be read.
    """
    name = file.name
    if encoding := wide_encoding(file.head):
        raise UnreadableFileError(f"{name}: {file.conversion(encoding)}")
    csv.field_size_limit(MOST_CHARACTERS)
    header: list[str] = []
    row = line = num_lines = 0

    def lines() -> Iterator[str]:
        nonlocal num_lines
        for text in byte_lines(file.chunks()):
            yield (text if num_lines else text.removeprefix(b"\xef\xbb\xbf")).decode() + "\n"
            num_lines += 1

    try:
        texts = lines()
        first = next(texts)
        delimiter = next((mark for mark in (delimiter, *OTHER_DELIMITERS) if mark in first), delimiter)
        reader = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
        for cells in reader:
            begin, line = line + 1, reader.line_num
            if not any(cells):
                continue
            if header:
                fault = _fault(cells, header)
                values = {key: cell or None for key, cell in zip(header, cells, strict=False) if key}
                faults = [f"{name}, row {row}, line {begin}: {fault}"] if fault else []
                yield RawRow(row, None if fault else values, faults, is_read=not fault)
                row += 1
                continue
            header = [cell.strip() or INDEX * (not number) for number, cell in enumerate(cells)]
            if repeated := next((column for column in header if column and header.count(column) > 1), None):
                fault = f"names the column {shown(repeated)} twice: only one could be read, take one out"
                raise UnreadableFileError(f"{name}, line {begin}: {fault}")
    except (csv.Error, UnicodeDecodeError, TooLongError) as error:
        place = f"{name}, line {line + 1}"
        if isinstance(error, UnicodeDecodeError):
            place, why = (
                f"{name}, line {num_lines + 1}",
                f"not UTF-8 ({error.reason}): convert it, for example with iconv",
            )
            if is_gb18030(error.object[error.start : error.start + 4096]):
                why = file.conversion("GB18030")
        else:
            meaning = next((said for begin, said in _MEANINGS.items() if str(error).startswith(begin)), TWICE)
            why = f"no CSV: {error}: {meaning}"
        raise UnreadableFileError(f"{place}: {why}; row {row} and what follows cannot be read") from None


def _fault(cells: list[str], header: list[str]) -> str | None:
    """Why cells are no row under these names; empty cells without a name are no fault."""
    if [cell.strip() for cell in cells] == header:
        return "names the columns once more: take the line out"
    if len(cells) < len(header) or any(cells[len(header) :]):
        fault = f"has {len(cells)} cells, and the first line names {len(header)} columns"
        return f"{fault}: put text that holds the delimiter, a line break or a quote into double quotes"
    nameless = next((cell for key, cell in zip(header, cells, strict=False) if cell and not key), None)
    return nameless and f"has {shown(nameless)} in a column without a name: name it in the first line"
