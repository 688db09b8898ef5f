"""Rows of CSV and TSV files: UTF-8, the names of the columns in the first line; streamed."""

import codecs
import csv
from collections.abc import Iterable, Iterator
from itertools import chain

from finetune.dataset.data_files import DataFile, UnreadableFileError, is_gb18030, wide_encoding
from finetune.dataset.json_decoder import shown
from finetune.dataset.json_reader import MOST_CHARACTERS, RawRow

DELIMITERS = {".csv": ",", ".tsv": "\t"}
INDEX = "__index_level_0__"  # pandas' index: its name in Parquet, in CSV it has none


def iter_csv_rows(file: DataFile, delimiter: str) -> Iterator[RawRow]:
    """All rows in order, cells as strings, empty ones as None; the faults have the line in which a row begins.

    Raises:
        UnreadableFileError: the file, or the rest of it, cannot be read.
    """
    name = file.name
    if encoding := wide_encoding(file.head):
        raise UnreadableFileError(f"{name}: {file.conversion(encoding)}")
    csv.field_size_limit(MOST_CHARACTERS)
    reader = csv.reader(_lines(file.chunks()), delimiter=delimiter, strict=True)
    header: list[str] = []
    row = line = 0
    try:
        for cells in reader:
            begin, line = line + 1, reader.line_num
            if not any(cells):
                continue
            if not header:
                header = [cell.strip() or INDEX * (not number) for number, cell in enumerate(cells)]
                if fault := _header_fault(header):
                    raise UnreadableFileError(f"{name}, line {begin}: {fault}")
            elif len(cells) != len(header):
                fault = f"has {len(cells)} cells, and the first line names {len(header)} columns"
                remedy = "put text that holds the delimiter, a line break or a quote into double quotes"
                yield RawRow(row, None, [f"{name}, row {row}, line {begin}: {fault}: {remedy}"], is_read=False)
                row += 1
            else:
                yield RawRow(row, {key: cell or None for key, cell in zip(header, cells, strict=True)}, [])
                row += 1
    except csv.Error as error:
        fault = f"{name}, line {line + 1}: no CSV: {error}"
        raise UnreadableFileError(f"{fault}; row {row} and what follows cannot be read") from None
    except UnicodeDecodeError as error:
        why = f"not UTF-8 ({error.reason}): convert it, for example with iconv"
        if is_gb18030(error.object[error.start : error.start + 4096]):
            why = file.conversion("GB18030")
        fault = f"{name}, line {reader.line_num + 1}: {why}"
        raise UnreadableFileError(f"{fault}; row {row} and what follows cannot be read") from None


def _header_fault(header: list[str]) -> str | None:
    repeated = next((column for column in header if header.count(column) > 1), None)
    if repeated is not None:
        return f"names the column {shown(repeated)} twice: only one could be read, take one out"
    if len(header) == 1 and (other := next((mark for mark in ";|\t" if mark in header[0]), None)):
        return f"names its columns with {shown(other)} between them: write commas (.csv) or tabs (.tsv)"
    return "names a column without a name: give it one" if "" in header else None


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder, rest = codecs.getincrementaldecoder("utf-8-sig")(), ""
    for chunk in chain(chunks, (b"",)):
        text = rest + decoder.decode(chunk, final=not chunk)
        lines = text.split("\n")
        rest = lines.pop()
        yield from (f"{line}\n" for line in lines)
    if rest:
        yield rest
