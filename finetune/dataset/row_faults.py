"""Faults of rows for a message: what many rows share is shown once, with its count and its first places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from finetune.utils.errors import SHOWN_FAULTS, format_faults

SHOWN_PLACES, LISTED_REPEATS, LONG_QUOTATION = 10, 3, 16
_PLACE = re.compile(r"(.+?), (row \d+[^:]*): (.*)", re.DOTALL)


class RowFaults:
    """Accumulates faults; memory holds the first 20 and the first 20 kinds, however many there are.

    >>> faults = RowFaults(f"a.json, row {row}: no turns" for row in range(0, 40, 2))
    >>> print(faults.message().replace(", row", " row"))
    20 faults:
      a.json row 0 row 2 row 4 row 6 row 8 row 10 row 12 row 14 row 16 row 18 and 10 more: no turns
    """

    def __init__(self, faults: Iterable[str] = ()) -> None:
        self.count = 0
        self._first: list[str] = []
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self.add(*faults)

    def add(self, *faults: str) -> None:
        """Count faults, each of which begins with its place; those of a row stand behind each other."""
        self._first += faults[: SHOWN_FAULTS - len(self._first)]
        for fault in faults:
            match = _PLACE.fullmatch(fault)
            source, place, text = match.groups() if match else ("", "", fault)
            self._add((source, kind_of(text)), _Kind(text, 1, 1, place.partition(",")[0], [place]))

    def merge(self, other: RowFaults) -> None:
        """Add the faults of later rows."""
        self._first += other._first[: SHOWN_FAULTS - len(self._first)]
        for kind, faults in other._kinds.items():
            self._add(kind, faults)
        self.count += other.count - sum(faults.count for faults in other._kinds.values())

    def _add(self, kind: tuple[str, str], faults: _Kind) -> None:
        self.count += faults.count
        known = self._kinds.get(kind)
        if known is not None:
            known.rows += faults.rows - (faults.rows == 1 and faults.last_row == known.last_row)
            known.count, known.last_row = known.count + faults.count, faults.last_row
            known.places = [*known.places, *faults.places][:SHOWN_PLACES]
        elif len(self._kinds) < SHOWN_FAULTS:
            self._kinds[kind] = replace(faults)

    def message(self, noun: str = "fault", rows: Mapping[str, int] | None = None) -> str:
        """Join the faults if they are few and mostly differ, else their kinds, each with an example; "" without any.

        Args:
            rows: the number of rows of each source, so that each kind says how many of them have it.
        """
        most = max((faults.count for faults in self._kinds.values()), default=0)
        if self.count <= SHOWN_FAULTS and most <= LISTED_REPEATS:
            return format_faults(self._first, noun) if self.count else ""
        lines = [_line(source, faults, (rows or {}).get(source)) for (source, _), faults in self._kinds.items()]
        rest = self.count - sum(faults.count for faults in self._kinds.values())
        more = [f"... and {rest:,} more"] if rest else []
        return "\n  ".join([f"{self.count:,} {noun}s:", *lines, *more])


@dataclass
class _Kind:
    """Faults of one kind: an example, how many there are in how many rows, the last row, the first places."""

    example: str
    count: int
    rows: int
    last_row: str
    places: list[str]


def kind_of(reason: str) -> str:
    """Strip place, numbers and quotations from a reason, so that similar reasons count as one."""
    reason = re.sub(r"^.*?, (?:row|line) \d+(?:, \w+ \d+)*: ", "", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", lambda match: "..." if len(match[0]) >= LONG_QUOTATION else match[0], reason)
    return re.sub(r"\d[\d,]*", "N", reason).partition(", found ")[0]


def _line(source: str, faults: _Kind, rows_of_source: int | None) -> str:
    if not source:
        return faults.example
    rest = [f"{faults.count - len(faults.places):,} more"] if faults.count > len(faults.places) else []
    *first, last = [*faults.places, *rest]
    places = f"{', '.join(first)}{' and ' if first else ''}{last}"
    if rows_of_source is None or len(faults.places) == 1:
        return f"{source}, {places}: {faults.example}"
    return f"{source}, {faults.rows:,} of {rows_of_source:,} rows: {faults.example} ({places})"
