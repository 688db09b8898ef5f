"""Rows that `--skip_rows` excludes: read from its files, looked up in the data, written to the ledger.

A line is `path/to/data.json:17`, rows counted from 0, or an object with `source` and `row` as in
`non_finite_rows.jsonl`. Blank lines and lines that begin with # are ignored.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.dataset.prepared_cache import int_column
from finetune.utils.errors import ConfigError, raise_faults
from finetune.utils.user_files import read_text

RowId = tuple[str, int]
REASON = "left out by --skip_rows"


def rows_to_skip(paths: Sequence[str], rows_by_source: Mapping[str, int]) -> tuple[RowId, ...]:
    """(source, row) of each row that the files name, by the source names of the data, sorted, without duplicates."""
    named = [row for path in paths for row in _read_rows(Path(path).expanduser())]
    sources = {str(Path(name).resolve()): name for name in rows_by_source} | {name: name for name in rows_by_source}
    rows: set[RowId] = set()
    faults = []
    for place, source, row in named:
        known = sources.get(source) or sources.get(str(Path(source).expanduser().resolve()))
        if known is None:
            faults.append(f"{place}: {source}:{row}: {source} is not among the data: {', '.join(rows_by_source)}")
        elif not 0 <= row < rows_by_source[known]:
            faults.append(f"{place}: {source}:{row}: {known} has rows 0 to {rows_by_source[known] - 1:,}")
        else:
            rows.add((known, row))
    raise_faults(faults, noun="row that --skip_rows names and the data does not have")
    return tuple(sorted(rows))


def _read_rows(path: Path) -> list[tuple[str, str, int]]:
    """(place, source, row) of each line."""
    rows = []
    lines = read_text(path, f"--skip_rows {path}").splitlines()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            place = f"--skip_rows {path}, line {number}"
            rows.append((place, *_parse_line(place, line)))
    return rows


def _parse_line(place: str, line: str) -> RowId:
    try:
        if line.startswith("{"):
            values = json.loads(line)
            source, number = values["source"], str(values["row"])
        else:
            source, _, number = line.rpartition(":")
        row = int(number)
    except (ValueError, KeyError, TypeError):
        source, row = "", 0
    if not source or not isinstance(source, str):
        raise ConfigError(f"{place}: {line[:80]}: expected path/to/data.json:17, or a line of non_finite_rows.jsonl")
    return source, row


def skip_mask(examples: Any, rows: Iterable[RowId]) -> np.ndarray:
    """Mark the examples of these rows, bool [examples]: all windows and all repetitions of a row."""
    wanted = set(rows)
    mask = np.zeros(len(examples), dtype=bool)
    if wanted:
        numbers = int_column(examples, "row")
        candidates = np.flatnonzero(np.isin(numbers, [row for _, row in wanted]))
        sources = examples.select(candidates)["source"]
        mask[candidates] = [pair in wanted for pair in zip(sources, numbers[candidates].tolist(), strict=True)]
    return mask


def skipped_entries(examples: Any, rows: Sequence[RowId]) -> list[dict[str, Any]]:
    """The ledger entries of skipped rows; `examples` are all of theirs, which have their ids."""
    ids = {(example["source"], example["row"]): json.loads(example["id"]) for example in examples}
    return [
        {"source": source, "row": row, "id": ids.get((source, row)), "status": "dropped", "reason": REASON}
        for source, row in rows
    ]
