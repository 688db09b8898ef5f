"""Read sources as checked conversations: streamed in order, in the memory of one row plus two digests per row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.conversation import BadRow, Conversation, Turn
from finetune.dataset.data_files import UnreadableFileError, open_data_file
from finetune.dataset.data_sources import Source, find_sources
from finetune.dataset.dedup import DuplicateIndex, digest_of_turns, key_of_id
from finetune.dataset.json_decoder import shown
from finetune.dataset.json_reader import RawRow, file_fault, iter_json_rows
from finetune.dataset.mojibake import MojibakeCounter
from finetune.dataset.parquet_reader import iter_dataset_rows, iter_parquet_rows
from finetune.dataset.row_checks import order_faults, repair_turns, surrogate_fault
from finetune.dataset.row_faults import RowFaults
from finetune.dataset.row_formats import OWN_FORMAT, ROLES, RowReading
from finetune.utils.errors import DataError


class ConversationReader:
    """Iterates over all rows of all sources, each a `Conversation` or a `BadRow`; `repairs` are names of `REPAIRS`."""

    def __init__(self, sources: Sequence[Source], *, repairs: Collection[str] = ()) -> None:
        self.sources = tuple(sources)
        self.repairs = tuple(repairs)
        self._bytes_of_source: Callable[[], int] = int
        self._begin()

    def __iter__(self) -> Iterator[Conversation | BadRow]:
        self._begin()
        for source_index, source in enumerate(self.sources):
            self._ids = DuplicateIndex()
            self._bytes_of_source = int
            for raw in self._raw_rows(source):
                yield self._check(raw, source, source_index)
            self._bytes_before += source.num_bytes
        self._bytes_of_source = int

    @property
    def roles(self) -> Counter[tuple[str, str, str]]:
        """Number of turns read, by source, the role name in the row, and the role it was read as."""
        return Counter(
            {
                (source, name, ROLES[name]): count
                for source, counts in self._role_names.items()
                for name, count in counts.items()
                if count
            }
        )

    def share_read(self) -> float:
        """Share that has been read, 0 to 1: of the bytes of files as they are on disk, of the rows of data sets."""
        if not self._all_bytes:
            return 1.0
        return min(1.0, (self._bytes_before + self._bytes_of_source()) / self._all_bytes)

    def notes(self) -> list[str]:
        """Lines for the user: other formats than this project's that were read, and sources with mojibake."""
        lines = []
        for (source, row_format), rows in self.rows_by_format.items():
            renamed = [
                f"{name} as {role}" for (owner, name, role) in self.roles if owner == source and name != role
            ] if " of " in row_format and "COIG" not in row_format else []  # fmt: skip
            if row_format != OWN_FORMAT or renamed:
                names = f" ({', '.join(renamed)})" if renamed else ""
                lines.append(f"{source}: {rows:,} row{'s' * (rows != 1)} read as {row_format}{names}")
        return lines + [note for name, counter in self._mojibake.items() if (note := counter.note(name)) is not None]

    def _begin(self) -> None:
        self.rows_by_format: Counter[tuple[str, str]] = Counter()
        self._role_names = {source.name: dict.fromkeys(ROLES, 0) for source in self.sources}
        self._mojibake = {source.name: MojibakeCounter() for source in self.sources}
        self._ids, self._turns = DuplicateIndex(), DuplicateIndex()
        self._all_bytes = sum(source.num_bytes for source in self.sources)
        self._bytes_before = 0
        self._bytes_of_source = int

    def _raw_rows(self, source: Source) -> Iterator[RawRow]:
        def progress(share: float) -> None:
            self._bytes_of_source = lambda: int(share * source.num_bytes)

        if source.dataset is not None:
            yield from iter_dataset_rows(source.dataset, source.name, progress)
            return
        try:
            with open_data_file(source.location) as file:
                if file.is_parquet:
                    yield from iter_parquet_rows(source.location, source.name, progress)
                    return
                self._bytes_of_source = file.position
                yield from iter_json_rows(file, source.name)
                self._bytes_of_source = int
        except UnreadableFileError as error:
            yield file_fault(f"{source.name}: {error}")

    def _check(self, raw: RawRow, source: Source, source_index: int) -> Conversation | BadRow:
        if not raw.is_read or raw.row is None:
            return BadRow(raw.row, source.name, None, tuple(raw.faults))
        place = f"{source.name}, row {raw.row}"
        reading = RowReading(raw.value, place, ignores_verdicts="ignore_verdicts" in self.repairs)
        faults = raw.faults + reading.faults
        turns: tuple[Turn, ...] = ()
        repairs: tuple[str, ...] = ()
        if reading.is_complete:
            numbered = [*enumerate(reading.turns)]
            if self.repairs:
                numbered, repairs = repair_turns(reading.turns, self.repairs)
            faults += order_faults(numbered, place)
            turns = tuple(turn for _, turn in numbered)
        own_id = raw.value.get("id") if isinstance(raw.value, dict) else None
        if own_id is not None:
            own_id = self._check_id(own_id, raw.row, place, source, faults)
        if turns:
            first = self._turns.first(digest_of_turns(turns), raw.row | source_index << 40, bool(faults))
            if first is not None:
                other, row = self.sources[first >> 40].name, first & (1 << 40) - 1
                faults.append(f"{place}: says the same as {other}, row {row}: take one of them out")
        if faults:
            return BadRow(raw.row, source.name, own_id, tuple(faults))
        self.rows_by_format[source.name, reading.format] += 1
        role_counts = self._role_names[source.name]
        for name in reading.role_names:
            role_counts[name] += 1
        self._mojibake[source.name].add([turn.text for turn in turns], raw.row)
        return Conversation(turns, raw.row, source.name, own_id, repairs)

    def _check_id(self, value: Any, row: int, place: str, source: Source, faults: list[str]) -> Any:
        """Return the id if it is a valid one; append its faults."""
        if not isinstance(value, str | int) and not (isinstance(value, float) and math.isfinite(value)):
            faults.append(f'{place}: expected "id" to be a string or a number, found {shown(value)}')
            return None
        fault = surrogate_fault(value, "id") if isinstance(value, str) else None
        if fault is not None:
            faults.append(f"{place}: {fault}")
            return None
        first = self._ids.first(key_of_id(value), row, bool(faults))
        if first is not None:
            faults.append(f"{place}: has the id {shown(value)} of row {first} in the same data: give each row its own")
        return value


def read_conversations(
    paths: str | Path | Sequence[str | Path], *, repairs: Collection[str] = ()
) -> list[Conversation]:
    """Read and check files, folders or data sets into memory.

    Raises:
        DataError: a source that cannot be found; all faults, the first 20 shown; or no conversation at all.
    """
    conversations: list[Conversation] = []
    faults = RowFaults()
    for row in ConversationReader(find_sources(paths), repairs=repairs):
        if isinstance(row, BadRow):
            faults.add(*row.faults)
        else:
            conversations.append(row)
    if faults.count:
        raise DataError(faults.message())
    return conversations
