"""Faults of rows for a message: what many rows share is shown once, with its count and its first places."""

from __future__ import annotations

import re
from collections.abc import Iterable

from finetune.utils.errors import SHOWN_FAULTS, format_faults

SHOWN_PLACES, LISTED_REPEATS = 10, 3
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
        self._kinds: dict[tuple[str, str], tuple[int, list[str]]] = {}
        self.add(*faults)

    def add(self, *faults: str) -> None:
        """Count faults, each of which begins with its place."""
        self._first += faults[: SHOWN_FAULTS - len(self._first)]
        for fault in faults:
            match = _PLACE.fullmatch(fault)
            source, place, text = match.groups() if match else ("", "", fault)
            self._add((source, text), 1, [place])

    def merge(self, other: RowFaults) -> None:
        """Add other faults behind these."""
        self._first += other._first[: SHOWN_FAULTS - len(self._first)]
        for kind, (count, places) in other._kinds.items():
            self._add(kind, count, places)
        self.count += other.count - sum(count for count, _ in other._kinds.values())

    def _add(self, kind: tuple[str, str], count: int, places: list[str]) -> None:
        self.count += count
        if kind in self._kinds or len(self._kinds) < SHOWN_FAULTS:
            before, first = self._kinds.get(kind, (0, []))
            self._kinds[kind] = before + count, [*first, *places][:SHOWN_PLACES]

    def message(self, noun: str = "fault") -> str:
        """Join the faults if they are few and mostly differ, else their kinds; "" without any."""
        most = max((count for count, _ in self._kinds.values()), default=0)
        if self.count <= SHOWN_FAULTS and most <= LISTED_REPEATS:
            return format_faults(self._first, noun) if self.count else ""
        lines = [_line(*kind, count, places) for kind, (count, places) in self._kinds.items()]
        rest = self.count - sum(count for count, _ in self._kinds.values())
        more = [f"... and {rest:,} more"] if rest else []
        return "\n  ".join([f"{self.count:,} {noun}s:", *lines, *more])


def _line(source: str, text: str, count: int, places: list[str]) -> str:
    if not source:
        return text
    rest = [f"{count - len(places):,} more"] if count > len(places) else []
    *first, last = [*places, *rest]
    return f"{source}, {', '.join(first)}{' and ' if first else ''}{last}: {text}"
