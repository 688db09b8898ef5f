"""Sources -> checked conversations, one by one and in order, in the memory of one row and two digests a row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.conversation import BadRow, Conversation
from finetune.dataset.data_files import UnreadableFileError, open_data_file
from finetune.dataset.data_sources import Source, find_sources
from finetune.dataset.dedup import DuplicateIndex, digest_of_turns, key_of_id
from finetune.dataset.json_decoder import shown
from finetune.dataset.json_reader import RawRow, file_fault, iter_json_rows
from finetune.dataset.mojibake import Mojibake
from finetune.dataset.parquet_reader import iter_dataset_rows, iter_parquet_rows
from finetune.dataset.row_checks import order_faults, repaired, surrogate_fault
from finetune.dataset.row_formats import OWN_LAYOUT, ROLES, RowReading
from finetune.utils.errors import DataError, format_faults


class ConversationReader:
    """All rows of all sources, each a `Conversation` or a `BadRow`; `repairs` are names of `REPAIRS`.

    `readings` counts the conversations by (source, layout).
    """

    def __init__(self, sources: Sequence[Source], *, repairs: Collection[str] = ()) -> None:
        self.sources = tuple(sources)
        self.repairs = tuple(repairs)
        self._begin()

    def __iter__(self) -> Iterator[Conversation | BadRow]:
        self._begin()
        for number, source in enumerate(self.sources):
            self._ids = DuplicateIndex()
            self._bytes_here = int
            for raw in self._raw_rows(source):
                yield self._checked(raw, source, number)
            self._bytes_before += source.num_bytes
        self._bytes_here = int

    @property
    def roles(self) -> Counter[tuple[str, str, str]]:
        """How many turns were read, by source, the name of the speaker in the row, and the role it was read as."""
        return Counter(
            {
                (source, name, ROLES[name]): count
                for source, names in self._names.items()
                for name, count in names.items()
                if count
            }
        )

    def share_read(self) -> float:
        """How much has been read, 0 to 1: of the bytes of the files as they lie on disk, of the rows of data sets."""
        if not self._all_bytes:
            return 1.0
        return min(1.0, (self._bytes_before + self._bytes_here()) / self._all_bytes)

    def said(self) -> list[str]:
        """A line for each way in which rows were read that are not written the way this project writes them.

        One more for each source whose texts look like UTF-8 that was read in another encoding.
        """
        lines = []
        for (source, layout), rows in self.readings.items():
            renamed = [
                f"{name} as {role}" for (where, name, role) in self.roles if where == source and name != role
            ] if " of " in layout and "COIG" not in layout else []  # fmt: skip
            if layout != OWN_LAYOUT or renamed:
                names = f" ({', '.join(renamed)})" if renamed else ""
                lines.append(f"{source}: {rows:,} row{'s' * (rows != 1)} read as {layout}{names}")
        return lines + [line for name, seen in self._mojibake.items() if (line := seen.line(name)) is not None]

    def _begin(self) -> None:
        self.readings: Counter[tuple[str, str]] = Counter()
        self._names = {source.name: dict.fromkeys(ROLES, 0) for source in self.sources}
        self._mojibake = {source.name: Mojibake() for source in self.sources}
        self._ids, self._turns = DuplicateIndex(), DuplicateIndex()
        self._all_bytes = sum(source.num_bytes for source in self.sources)
        self._bytes_before = 0
        self._bytes_here: Callable[[], int] = int

    def _raw_rows(self, source: Source) -> Iterator[RawRow]:
        def progress(share: float) -> None:
            self._bytes_here = lambda: int(share * source.num_bytes)

        if source.dataset is not None:
            yield from iter_dataset_rows(source.dataset, source.name, progress)
            return
        try:
            with open_data_file(source.place) as file:
                if file.is_parquet:
                    yield from iter_parquet_rows(source.place, source.name, progress)
                    return
                self._bytes_here = file.position
                yield from iter_json_rows(file, source.name)
                self._bytes_here = int
        except UnreadableFileError as error:
            yield file_fault(f"{source.name}: {error}")

    def _checked(self, raw: RawRow, source: Source, number: int) -> Conversation | BadRow:
        if not raw.is_read:
            return BadRow(raw.row, source.name, None, tuple(raw.faults))
        place = f"{source.name}, row {raw.row}"
        reading = RowReading(raw.value, place)
        faults = raw.faults + reading.faults
        turns, done = (), ()
        if reading.is_whole:
            numbered, done = (
                repaired(reading.turns, self.repairs) if self.repairs else ([*enumerate(reading.turns)], ())
            )
            faults += order_faults(numbered, place)
            turns = tuple(turn for _, turn in numbered)
        own_id = raw.value.get("id") if isinstance(raw.value, dict) else None
        if own_id is not None:
            own_id = self._check_id(own_id, raw.row, place, source, faults)
        if turns:
            key = digest_of_turns(turns)
            first = self._turns.first(key, raw.row | number << 40, bool(faults))
            if first is not None:
                where = self.sources[first >> 40].name
                faults.append(f"{place}: says the same as {where}, row {first & (1 << 40) - 1}: take one of them out")
        if faults:
            return BadRow(raw.row, source.name, own_id, tuple(faults))
        self.readings[source.name, reading.layout] += 1
        names = self._names[source.name]
        for name in reading.aliases:
            names[name] += 1
        self._mojibake[source.name].see([turn.text for turn in turns], raw.row)
        return Conversation(turns, raw.row, source.name, own_id, done)

    def _check_id(self, value: Any, row: int, place: str, source: Source, faults: list[str]) -> Any:
        """The id where it can be one; adds what is wrong with it."""
        fine = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
        if not fine:
            faults.append(f'{place}: expected "id" to be a string or a number, found {shown(value)}')
            return None
        broken = surrogate_fault(value, "id") if isinstance(value, str) else None
        if broken is not None:
            faults.append(f"{place}: {broken}")
            return None
        first = self._ids.first(key_of_id(value), row, bool(faults))
        if first is not None:
            faults.append(f"{place}: has the id {shown(value)} of row {first} in the same data: give each row its own")
        return value


def read_conversations(
    paths: str | Path | Sequence[str | Path], *, repairs: Collection[str] = ()
) -> list[Conversation]:
    """Read and check files, folders or data sets, everything in memory.

    Raises:
        DataError: what `find_sources` refuses; every fault, the first 20 shown; or there is no conversation at all.
    """
    conversations, faults = [], []
    for row in ConversationReader(find_sources(paths), repairs=repairs):
        if isinstance(row, BadRow):
            faults += row.faults
        else:
            conversations.append(row)
    if faults:
        raise DataError(format_faults(faults, "fault"))
    return conversations
