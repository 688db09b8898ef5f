"""Rows of Arrow tables: Parquet files and `datasets.Dataset` objects, read in batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from finetune.dataset.data_files import UnreadableFileError
from finetune.dataset.json_reader import RawRow
from finetune.utils.errors import first_line

BATCH_ROWS = 256

Progress = Callable[[float], None]


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
                yield batch.to_pylist(maps_as_pydicts="strict"), file.metadata.num_rows

    yield from _rows(batches(), name, progress, "the Parquet file cannot be read ({}): fetch or write it again; ")


def iter_dataset_rows(dataset: Any, name: str, progress: Progress) -> Iterator[RawRow]:
    """All rows of a `datasets.Dataset` in order, columns as they are stored; `progress` as above."""
    tables = dataset.with_format("arrow").iter(BATCH_ROWS)
    batches = ((table.to_pylist(maps_as_pydicts="strict"), len(dataset)) for table in tables)
    yield from _rows(batches, name, progress, "the saved data cannot be read ({}): ")


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
