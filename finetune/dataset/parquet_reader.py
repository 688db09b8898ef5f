"""Rows of Arrow tables: Parquet files and `datasets.Dataset` objects, read in batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from finetune.dataset.data_files import UnreadableFileError
from finetune.dataset.json_reader import RawRow
from finetune.dataset.tool_reading import ARGUMENTS, TOOL_KEYS, StructObject
from finetune.utils.errors import first_line

BATCH_ROWS = 256

# Keys of objects whose keys differ from row to row: a struct of a table has those of all rows, with nulls.
FREE_OBJECTS = frozenset({*ARGUMENTS, *TOOL_KEYS, "parameters", "response", "json"})

Progress = Callable[[float], None]
Mark = Callable[[Any], Any]


def iter_parquet_rows(path: str, name: str, progress: Progress) -> Iterator[RawRow]:
    """All rows of a Parquet file in order; `progress` gets the share that has been read."""
    import pyarrow.parquet

    def batches() -> Iterator[tuple[list[Any], int]]:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            repeated = next((column for column in columns if columns.count(column) > 1), None)
            if repeated:
                fault = f'has the column "{repeated}" twice: only one could be read, take one out'
                raise UnreadableFileError(f"{name}: {fault}")
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                yield _values(batch), file.metadata.num_rows

    yield from _rows(batches(), name, progress, "the Parquet file cannot be read ({}): fetch or write it again; ")


def iter_dataset_rows(dataset: Any, name: str, progress: Progress) -> Iterator[RawRow]:
    """All rows of a `datasets.Dataset` in order, columns as they are stored; `progress` as above."""
    tables = dataset.with_format("arrow").iter(BATCH_ROWS)
    batches = ((_values(table), len(dataset)) for table in tables)
    yield from _rows(batches, name, progress, "the saved data cannot be read ({}): ")


def _values(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch or a table, with a `StructObject` for each struct under a key of `FREE_OBJECTS`."""
    rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    for field in batch.schema:
        if (mark := _mark_of(field)) is not None:
            for row in rows:
                row[field.name] = mark(row[field.name])
    return rows


def _mark_of(field: Any, key: str = "") -> Mark | None:
    """What marks the structs in a value of this Arrow field; None if there is none to mark."""
    import pyarrow.types

    kind, key = field.type, key or field.name
    if pyarrow.types.is_struct(kind):
        if key in FREE_OBJECTS:
            return lambda value: value if value is None else StructObject(value)
        marks = {child.name: mark for child in kind if (mark := _mark_of(child)) is not None}
        return partial(_marked_struct, marks) if marks else None
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        mark = _mark_of(kind.value_field, key)
        return mark and (lambda value: value if value is None else [mark(item) for item in value])
    return None


def _marked_struct(marks: Mapping[str, Mark], value: Any) -> Any:
    return value if value is None else value | {name: mark(value[name]) for name, mark in marks.items()}


def _rows(batches: Iterable[tuple[list[Any], int]], name: str, progress: Progress, reason: str) -> Iterator[RawRow]:
    """The rows of batches of (rows, number of all rows); `UnreadableFileError` if they cannot be read to the end."""
    import pyarrow

    row = 0
    try:
        for values, count in batches:
            for value in values:
                yield RawRow(row, value, [])
                row += 1
            progress(row / count)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError, ImportError) as error:
        fault = f"{name}: {reason.format(first_line(error))}row {row} and what follows are lost"
        raise UnreadableFileError(fault) from None
