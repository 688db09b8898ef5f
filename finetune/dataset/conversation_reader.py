"""Read sources as checked conversations: streamed in order, in the memory of one row plus two digests per row."""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from finetune.conversation import BadRow, Conversation, Turn, to_row
from finetune.dataset.csv_reader import iter_csv_rows
from finetune.dataset.data_files import UnreadableFileError, open_data_file
from finetune.dataset.data_sources import Source, find_sources
from finetune.dataset.dedup import DuplicateIndex, digest_of_row, digest_of_turns, key_of_id
from finetune.dataset.json_decoder import shown
from finetune.dataset.json_reader import RawRow, iter_json_rows
from finetune.dataset.message_trees import rows_of_trees
from finetune.dataset.parquet_reader import iter_dataset_rows, iter_parquet_rows
from finetune.dataset.read_counts import ReadCounts
from finetune.dataset.row_checks import order_faults, repair_turns, surrogate_fault
from finetune.dataset.row_faults import RowFaults
from finetune.dataset.row_formats import with_columns
from finetune.dataset.row_reading import RowReading
from finetune.dataset.tool_checks import check_tools
from finetune.utils.errors import DataError

ROW_BITS = 40
ROW_MASK = (1 << ROW_BITS) - 1


class RowKeys(NamedTuple):
    """What decides whether a row duplicates an earlier one; None for what it does not have."""

    source_index: int
    row: int
    id: Any = None
    turns: bytes | None = None
    has_faults: bool = False


class CheckedRow(NamedTuple):
    """A row that has been read and checked by itself, its duplicates not yet known."""

    row: Conversation | BadRow
    reading: RowReading | None
    faults: list[str]
    keys: RowKeys | None


class ConversationReader:
    """Iterates over all rows of all sources, each a `Conversation` or a `BadRow`; `repairs` are names of `REPAIRS`.

    An iteration is `finish(check(raw), first_rows(keys))` of each raw row. `check` and `finish` may run in another
    process, `raw_rows` and `first_rows` run in one, in order.
    """

    def __init__(self, sources: Sequence[Source], *, repairs: Collection[str] = ()) -> None:
        self.sources = tuple(sources)
        self.repairs = tuple(repairs)
        self._bytes_of_source: Callable[[], int] = int
        self._begin()

    def __iter__(self) -> Iterator[Conversation | BadRow]:
        for numbered in self.raw_rows():
            checked = self.check(*numbered)
            yield self.finish(checked, self.first_rows(checked.keys), self.counts)

    def raw_rows(self) -> Iterator[tuple[int, RawRow]]:
        """Every row in order, with the index of its source."""
        self._begin()
        columns = {column: key for source in self.sources for key, column in source.columns}
        found: set[str] = set()
        for source_index, source in enumerate(self.sources):
            self._bytes_of_source = int
            raw = None
            for raw in rows_of_trees(self._raw_rows(source), partial(self._has_faults, source_index)):
                if columns and isinstance(raw.value, dict) and not columns.keys() <= found:
                    found.update(raw.value)
                yield source_index, raw
            if raw is None:
                yield source_index, _file_fault(f"{source.name}: holds no conversations")
            self._bytes_before += source.num_bytes
        self._bytes_of_source = int
        for column, key in columns.items() if found else ():
            if column not in found:
                fault = f"--columns {key}={column}: no row has {shown(column)}: correct the name, or leave it out"
                yield len(self.sources) - 1, _file_fault(fault)

    def share_read(self) -> float:
        """Share that has been read, 0 to 1: of the bytes of files as they are on disk, of the rows of data sets."""
        if not self._all_bytes:
            return 1.0
        return min(1.0, (self._bytes_before + self._bytes_of_source()) / self._all_bytes)

    def _begin(self) -> None:
        self.counts = ReadCounts()
        self._ids, self._turns, self._source_of_ids = DuplicateIndex(), DuplicateIndex(), 0
        self._all_bytes = sum(source.num_bytes for source in self.sources)
        self._bytes_before = 0
        self._bytes_of_source = int

    def _raw_rows(self, source: Source) -> Iterator[RawRow]:
        def progress(share: float) -> None:
            self._bytes_of_source = lambda: int(share * source.num_bytes)

        try:
            if source.dataset is not None:
                yield from iter_dataset_rows(source.dataset, source.name, progress)
                return
            with open_data_file(source.location, source.name) as file:
                if file.is_parquet:
                    yield from iter_parquet_rows(source.location, source.name, progress)
                    return
                self._bytes_of_source = file.position
                if source.delimiter is not None and file.head.lstrip()[:2] not in (b'{"', b"[{"):
                    yield from iter_csv_rows(file, source.delimiter)
                else:
                    yield from iter_json_rows(file)
                self._bytes_of_source = int
        except UnreadableFileError as error:
            yield _file_fault(str(error))

    def _has_faults(self, source_index: int, raw: RawRow) -> bool:
        checked = self.check(source_index, raw)
        return isinstance(checked.row, BadRow) or bool(checked.faults)

    def check(self, source_index: int, raw: RawRow) -> CheckedRow:
        """Read and check one row by itself."""
        name, faults = self.sources[source_index].name, raw.faults
        if raw.is_read and raw.row is not None:
            try:
                return self._check(source_index, raw, raw.row)
            except RecursionError:
                faults = [f"{name}, row {raw.row}: nested too deeply: write it with fewer levels"]
        return CheckedRow(BadRow(raw.row, name, None, tuple(faults)), None, [], None)

    def _check(self, source_index: int, raw: RawRow, row: int) -> CheckedRow:
        name = self.sources[source_index].name
        place = f"{name}, row {row}"
        columns = self.sources[source_index].columns
        value = with_columns(raw.value, columns) if columns else raw.value
        reading = RowReading(value, place, ignores_verdicts="ignore_verdicts" in self.repairs)
        faults = raw.faults + reading.faults
        turns: tuple[Turn, ...] = ()
        repairs: tuple[str, ...] = ()
        is_plain = False
        if reading.is_complete:
            numbered = [*zip(reading.numbers, reading.turns, strict=True)]
            turns = tuple(reading.turns)
            if self.repairs:
                numbered, repairs = repair_turns(numbered, self.repairs)
            faults += order_faults(numbered, place)
            if not (is_plain := reading.is_plain):
                allows = "undeclared_tools" in self.repairs
                numbered, tool_faults = check_tools(
                    numbered, reading.declared, place, allows_undeclared=allows, unread=reading.unread
                )
                faults += tool_faults
            if self.repairs or not is_plain:
                turns = tuple(turn for _, turn in numbered)
        own_id = value.get("id") if isinstance(value, dict) else None
        if own_id is not None and (fault := _id_fault(own_id)) is not None:
            faults.append(f"{place}: {fault}")
            own_id = None
        if is_plain:
            digest: bytes | None = digest_of_turns(turns)
        else:
            digest = digest_of_row(to_row(turns, None, reading.tools, reading.template_kwargs))
            if digest is None and not raw.faults:
                faults.append(
                    f"{place}: its tools, calls or template variables hold a date, bytes, NaN or another value that "
                    "JSON does not have: write it as text"
                )
        conversation = Conversation(turns, row, name, own_id, repairs, reading.tools, reading.template_kwargs)
        id_key = None if own_id is None else key_of_id(own_id)
        keys = RowKeys(source_index, row, id_key, digest if turns else None, bool(faults))
        return CheckedRow(conversation, reading, faults, keys)

    def first_rows(self, keys: RowKeys | None) -> tuple[int | None, int | None]:
        """The earlier rows with the same id and with the same turns, each `row | source_index << ROW_BITS`."""
        if keys is None:
            return None, None
        if keys.source_index != self._source_of_ids:
            self._ids, self._source_of_ids = DuplicateIndex(), keys.source_index
        position = keys.row | keys.source_index << ROW_BITS
        same_id = None if keys.id is None else self._ids.first(keys.id, position, keys.has_faults)
        is_bad = keys.has_faults or same_id is not None
        return same_id, None if keys.turns is None else self._turns.first(keys.turns, position, is_bad)

    def finish(
        self, checked: CheckedRow, first_rows: tuple[int | None, int | None], counts: ReadCounts
    ) -> Conversation | BadRow:
        """The conversation, counted in `counts`, or its faults; `first_rows` as the method of that name returns it."""
        row, faults = checked.row, [*checked.faults]
        if isinstance(row, BadRow) or checked.reading is None:
            return row
        place = f"{row.source}, row {row.row}"
        same_id, same_turns = first_rows
        if same_id is not None:
            first = same_id & ROW_MASK
            faults.append(f"{place}: has the id {shown(row.id)} of row {first} in the same data: give each row its own")
        if same_turns is not None:
            same = f"says the same as {self.sources[same_turns >> ROW_BITS].name}, row {same_turns & ROW_MASK}"
            if not checked.faults and "drop_duplicates" in self.repairs:
                return BadRow(row.row, row.source, row.id, (f"{place}: drop_duplicates: {same}",), is_fault=False)
            faults.append(f"{place}: {same}: take one of them out, or use --repairs drop_duplicates")
        if faults:
            return BadRow(row.row, row.source, row.id, tuple(faults))
        counts.add(row, checked.reading)
        return row


def _file_fault(fault: str) -> RawRow:
    return RawRow(None, None, [fault], is_read=False)


def _id_fault(value: Any) -> str | None:
    if not isinstance(value, str | int) and not (isinstance(value, float) and math.isfinite(value)):
        return f'expected "id" to be a string or a number, found {shown(value)}'
    return surrogate_fault(value, "id") if isinstance(value, str) else None


def read_conversations(
    paths: str | Path | Sequence[str | Path],
    *,
    repairs: Collection[str] = (),
    columns: Sequence[str] = (),
    seconds: float = math.inf,
) -> list[Conversation]:
    """Read and check files, folders or data sets into memory.

    Args:
        seconds: after which the rest is left unread.

    Raises:
        DataError: a source that cannot be found; all faults, the first 20 shown; or no conversation at all.
    """
    conversations: list[Conversation] = []
    faults = RowFaults()
    rows: Counter[str] = Counter()
    sources, began = find_sources(paths, columns), time.monotonic()
    for row in ConversationReader(sources, repairs=repairs):
        rows[row.source] += 1
        if isinstance(row, BadRow):
            faults.add(*row.faults[: None if row.is_fault else 0])
        else:
            conversations.append(row)
        if time.monotonic() - began > seconds:
            rows.clear()  # how many there are is not known
            break
    if faults.count:
        raise DataError(faults.message(rows=rows))
    return conversations
