"""What a data set comes to: counts, reasons, lengths; gathered batch by batch, said in a few lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.chat_templates import RenderedConversation
from finetune.conversation import BadRow
from finetune.utils.errors import SHOWN_FAULTS

HISTOGRAM_BINS = 24
BARS = " ▁▂▃▄▅▆▇█"
SHOWN_REASONS = 5
LONG_QUOTATION = 16


@dataclass(frozen=True)
class DataSummary:
    """Counts over one data set; tokens are those of the examples, supervised ones those that are learned.

    `bad` of the `dropped` rows were dropped for a fault (`faults` in all), `spelled` rows spell a control token, which
    stayed text. `reasons` counts the rows not kept whole by the kind of reason. `length_histogram` counts the examples
    in equal bins from 0 to `longest` tokens, `length_percentiles` are the 50th, 90th and 99th. `examples_by_source` are
    those of each source, in the order in which they lie.
    """

    rows: int
    kept: int
    cut: int
    split: int
    dropped: int
    bad: int
    faults: int
    spelled: int
    examples: int
    tokens: int
    supervised_tokens: int
    longest: int
    reasons: dict[str, int]
    length_histogram: list[int]
    length_percentiles: list[int]
    rows_by_source: dict[str, int]
    examples_by_source: dict[str, int]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> DataSummary:
        """A summary out of its `facts`.

        Raises:
            TypeError: they are those of another version.
        """
        return cls(**{name: value for name, value in facts.items() if name != "supervised_share"})

    @property
    def supervised_share(self) -> float:
        """Learned tokens over all tokens, 0 to 1; 0 without tokens."""
        return self.supervised_tokens / max(self.tokens, 1)

    def facts(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return {**asdict(self), "supervised_share": round(self.supervised_share, 4)}

    def described(self) -> list[tuple[str, str]]:
        """The summary for a page: (label, text)."""
        share = f"{self.supervised_share:.1%}"
        rows = [
            ("Rows", self._rows()),
            ("Examples", f"{self.examples:,}, the longest {self.longest:,} tokens"),
            ("Tokens", f"{self.tokens:,}, {self.supervised_tokens:,} of them learned ({share})"),
        ]
        if self.examples:
            half, most, nearly_all = self.length_percentiles
            rows.append(("Lengths", f"half have at most {half:,} tokens, 90 % {most:,}, 99 % {nearly_all:,}"))
        if self.spelled:
            rows.append(("Spelled", f"{self.spelled:,} rows spell a control token, which is read as plain text"))
        return rows

    def most_reasons(self) -> list[tuple[str, int]]:
        """Why rows were not kept whole, and how many each time; the most frequent first."""
        return sorted(self.reasons.items(), key=lambda one: -one[1])

    def _rows(self) -> str:
        counts = (f"{getattr(self, status):,} {status}" for status in ("kept", "cut", "split", "dropped"))
        return f"{self.rows:,}: {', '.join(counts)}"

    def lines(self) -> list[str]:
        """The summary for a terminal, one fact a line."""
        lines = [
            f"rows      {self._rows()}",
            f"tokens    {self.tokens:,} in {self.examples:,} examples, {self.supervised_share:.1%} of them learned",
        ]
        if self.examples:
            lines.append(self._lengths())
        if self.spelled:
            lines.append(f"spelled   {self.spelled:,} rows spell a control token; it is read as plain text")
        most = self.most_reasons()
        lines += [f"  {count:>7,}  {reason}" for reason, count in most[:SHOWN_REASONS]]
        if len(most) > SHOWN_REASONS:
            rest = sum(count for _, count in most[SHOWN_REASONS:])
            lines.append(f"  {rest:>7,}  for {len(most) - SHOWN_REASONS} other reasons")
        return lines

    def _lengths(self) -> str:
        highest = max(self.length_histogram)
        drawn = "".join(BARS[-(-count * (len(BARS) - 1) // highest)] for count in self.length_histogram)
        half, most, nearly_all = self.length_percentiles
        return (
            f"lengths   0 {drawn} {self.longest:,} tokens; half have at most {half:,}, "
            f"90 % {most:,}, 99 % {nearly_all:,}"
        )


@dataclass
class DataTally:
    """A summary in the making; `faults` are the first ones of bad rows, all of them counted."""

    statuses: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    rows_by_source: Counter[str] = field(default_factory=Counter)
    examples_by_source: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    unreadable: bool = False

    def add(self, rows: Iterable[RenderedConversation | BadRow]) -> None:
        """Count these rows."""
        for row in rows:
            if isinstance(row, BadRow):
                self._add_bad(row)
                continue
            self.statuses[row.status] += 1
            self.rows_by_source[row.source] += 1
            self.examples_by_source[row.source] += len(row.examples)
            self.counts["spelled"] += bool(row.spelled)
            if row.reason:
                self.reasons[kind_of(row.reason)] += 1
            for example in row.examples:
                self.lengths[len(example.input_ids)] += 1
                self.counts["supervised"] += example.num_supervised

    def _add_bad(self, row: BadRow) -> None:
        self.num_faults += len(row.faults)
        self.faults += row.faults[: SHOWN_FAULTS - len(self.faults)]
        if row.row is None:
            self.unreadable = True
            return
        self.statuses["dropped"] += 1
        self.counts["bad"] += 1
        self.rows_by_source[row.source] += 1
        self.reasons[kind_of(row.faults[0])] += 1

    def merge(self, other: DataTally) -> None:
        """Add another tally to this one."""
        for name in ("statuses", "counts", "reasons", "lengths", "rows_by_source", "examples_by_source"):
            getattr(self, name).update(getattr(other, name))
        self.faults += other.faults[: SHOWN_FAULTS - len(self.faults)]
        self.num_faults += other.num_faults
        self.unreadable |= other.unreadable

    def summary(self) -> DataSummary:
        """The counts so far."""
        longest = max(self.lengths, default=0)
        return DataSummary(
            rows=self.statuses.total(),
            kept=self.statuses["kept"],
            cut=self.statuses["cut"],
            split=self.statuses["split"],
            dropped=self.statuses["dropped"],
            bad=self.counts["bad"],
            faults=self.num_faults,
            spelled=self.counts["spelled"],
            examples=self.lengths.total(),
            tokens=sum(length * count for length, count in self.lengths.items()),
            supervised_tokens=self.counts["supervised"],
            longest=longest,
            reasons=dict(self.reasons),
            length_histogram=_histogram(self.lengths, longest),
            length_percentiles=[_percentile(self.lengths, share) for share in (0.5, 0.9, 0.99)],
            rows_by_source=dict(self.rows_by_source),
            examples_by_source=dict(self.examples_by_source),
        )


def kind_of(reason: str) -> str:
    """A reason without its place, numbers and quotations, so that like reasons count as one."""
    general = re.sub(r"^.*?, (?:row|line) \d+(?:, \w+ \d+)*: ", "", reason)
    general = re.sub(r"'[^']*'|\"[^\"]*\"", lambda one: one[0] if len(one[0]) < LONG_QUOTATION else "...", general)
    return re.sub(r"\d[\d,]*", "N", general).partition(", found ")[0]


def _histogram(lengths: Counter[int], longest: int) -> list[int]:
    counts = [0] * HISTOGRAM_BINS
    for length, count in lengths.items():
        counts[min(length * HISTOGRAM_BINS // (longest + 1), HISTOGRAM_BINS - 1)] += count
    return counts


def _percentile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the examples does not exceed."""
    wanted, seen = share * lengths.total(), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0
