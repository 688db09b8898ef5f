"""Tables -> rows: Parquet files, and what `datasets` has loaded, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from finetune.dataset.json_reader import RawRow, file_fault

BATCH_ROWS = 256


def iter_parquet_rows(path: str, name: str, progress: Callable[[float], None]) -> Iterator[RawRow]:
    """All rows in order; `progress` is told the share that has been read."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            twice = _twice(file.schema_arrow.names)
            if twice:
                yield file_fault(f'{name}: has the column "{twice}" twice: only one could be read, take one out')
                return
            count = file.metadata.num_rows
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                for value in batch.to_pylist():
                    yield RawRow(row, value, [])
                    row += 1
                progress(row / count)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError) as error:
        said = str(error).strip().partition("\n")[0]
        yield file_fault(
            f"{name}: the Parquet file cannot be read ({said}): fetch or write it again; row {row} and what follows "
            "are lost"
        )
        return
    if not row:
        yield file_fault(f"{name}: holds no conversations")


def iter_dataset_rows(dataset: Any, name: str, progress: Callable[[float], None]) -> Iterator[RawRow]:
    """All rows of a `datasets.Dataset` in order, columns as they are stored."""
    import pyarrow

    row = 0
    try:
        for table in dataset.with_format("arrow").iter(BATCH_ROWS):
            for value in table.to_pylist():
                yield RawRow(row, value, [])
                row += 1
            progress(row / len(dataset))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        said = str(error).strip().partition("\n")[0]
        yield file_fault(f"{name}: the saved data cannot be read ({said}): row {row} and what follows are lost")
        return
    if not row:
        yield file_fault(f"{name}: holds no conversations")


def _twice(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)
