"""Dataset statistics (row counts, drop reasons, length histogram), accumulated per batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.chat_templates import RenderedConversation
from finetune.conversation import BadRow
from finetune.dataset.row_faults import RowFaults, kind_of
from finetune.utils.user_files import from_json

STATUSES = ("kept", "cut", "split", "dropped")
COUNTS = ("bad", "spelled", "repeated_tokens", "with_reasoning")
HISTOGRAM_BINS = 24
BARS = " ▁▂▃▄▅▆▇█"
SHOWN_REASONS = SHOWN_SOURCES = SHOWN_OPENINGS = 5


@dataclass(frozen=True)
class DataSummary:
    """Counts over one data set; tokens are counted in its examples.

    `bad` of the `dropped` rows were dropped for a fault (`faults` in all); `spelled` rows spell a control token, which
    stayed text; `with_reasoning` rows have reasoning in a model turn. `reasons` counts rows that were cut, split or
    dropped by kind of reason. `length_histogram` counts the examples in equal bins from 0 to `longest` tokens;
    `length_percentiles` are the 50th, 90th and 99th. `repeated_tokens` are those of turns that an earlier example of
    the same row has, too. `examples_by_source` has the sources in the order of the data. `written_openings` and
    `served_openings` count the answers in front of which the model, or the prompt of serving, writes a text.
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
    repeated_tokens: int = 0
    with_reasoning: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    supervised_by_source: dict[str, int] = field(default_factory=dict)
    written_openings: dict[str, int] = field(default_factory=dict)
    served_openings: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> DataSummary:
        """Restore a summary from its `facts`; a `TypeError` if another version wrote them."""
        return from_json(
            cls, {name: value for name, value in facts.items() if name != "supervised_share"}, "data.summary:"
        )

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over all tokens, 0 to 1; 0 without tokens."""
        return self.supervised_tokens / max(self.tokens, 1)

    @property
    def not_whole(self) -> int:
        """Rows that were cut, split or dropped."""
        return self.cut + self.split + self.dropped

    def facts(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return {**asdict(self), "supervised_share": round(self.supervised_share, 4)}

    def described(self) -> list[tuple[str, str]]:
        """The summary as (label, text)."""
        counts = ", ".join(f"{getattr(self, status):,} {status}" for status in STATUSES)
        examples = f"{self.tokens:,} in {self.examples:,} examples, {self.supervised_share:.1%} of them supervised"
        rows = [("Rows", f"{self.rows:,}: {counts}"), ("Tokens", examples)]
        if self.examples:
            half, most, nearly_all = self.length_percentiles
            longest = f"up to {self.longest:,} tokens"
            rows.append(("Lengths", f"{longest}; half have at most {half:,}, 90 % {most:,}, 99 % {nearly_all:,}"))
        if self.repeated_tokens:
            once, share = self.tokens - self.repeated_tokens, self.repeated_tokens / self.tokens
            words = f"{self.repeated_tokens:,} tokens ({share:.1%}) are turns of an earlier example of the same row"
            rows.append(("Repeated", f"{words}; {once:,} are read once"))
        by_tokens = Counter(self.tokens_by_source).most_common()
        for name, tokens in by_tokens[:SHOWN_SOURCES] if len(by_tokens) > 1 else ():
            supervised = f"{self.supervised_by_source[name] / max(tokens, 1):.1%} of them supervised"
            rows.append(("Source", f"{name}: {tokens:,} tokens ({tokens / self.tokens:.1%}), {supervised}"))
        if len(by_tokens) > SHOWN_SOURCES:
            rows.append(("Source", f"... and {len(by_tokens) - SHOWN_SOURCES:,} more, each with fewer tokens"))
        for openings, who in (
            (self.written_openings, "the model writes it (supervised)"),
            (self.served_openings, "serving writes it (not supervised)"),
        ):
            for text, count in Counter(openings).most_common(SHOWN_OPENINGS):
                rows.append(("Opening", f"{json.dumps(text, ensure_ascii=False)} in front of {count:,} answers: {who}"))
        if self.spelled:
            rows.append(("Spelled", f"{self.spelled:,} rows spell a control token; it is read as plain text"))
        return rows

    def most_reasons(self) -> list[tuple[str, int]]:
        """Kinds of reasons with their counts, the most frequent first."""
        return Counter(self.reasons).most_common()

    def lines(self) -> list[str]:
        """The summary for a terminal, one fact a line, with a histogram of the lengths."""
        highest = max(self.length_histogram)
        bars = "".join(BARS[-(-count * (len(BARS) - 1) // max(highest, 1))] for count in self.length_histogram)
        starts = {"Lengths": f"0 {bars} "}
        lines = [f"{label.lower():<10}{starts.get(label, '')}{text}" for label, text in self.described()]
        most = self.most_reasons()
        lines += [f"  {count:>7,}  {reason}" for reason, count in most[:SHOWN_REASONS]]
        if len(most) > SHOWN_REASONS:
            rest = sum(count for _, count in most[SHOWN_REASONS:])
            lines.append(f"  {rest:>7,}  for {len(most) - SHOWN_REASONS} other reasons")
        return lines


@dataclass
class DataTally:
    """Accumulates a summary, which has most counts under the same names."""

    statuses: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    rows_by_source: Counter[str] = field(default_factory=Counter)
    examples_by_source: Counter[str] = field(default_factory=Counter)
    tokens_by_source: Counter[str] = field(default_factory=Counter)
    supervised_by_source: Counter[str] = field(default_factory=Counter)
    written_openings: Counter[str] = field(default_factory=Counter)
    served_openings: Counter[str] = field(default_factory=Counter)
    faults: RowFaults = field(default_factory=RowFaults)
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
            self.counts["with_reasoning"] += row.has_reasoning
            for text, is_supervised in row.openings:
                (self.written_openings if is_supervised else self.served_openings)[text] += 1
            if row.reason:
                self.reasons[kind_of(row.reason)] += 1
            seen: set[int] = set()
            for example in row.examples:
                self.lengths[len(example.input_ids)] += 1
                self.tokens_by_source[row.source] += len(example.input_ids)
                self.supervised_by_source[row.source] += example.num_supervised
                self.counts["repeated_tokens"] += sum(
                    span.stop - span.start for span in example.turn_spans if span.turn in seen
                )
                seen.update(span.turn for span in example.turn_spans)

    def _add_bad(self, row: BadRow) -> None:
        if row.is_fault:
            self.faults.add(*row.faults)
        if row.row is None:
            self.unreadable = True
            return
        self.statuses["dropped"] += 1
        self.counts["bad"] += row.is_fault
        self.rows_by_source[row.source] += 1
        self.reasons[kind_of(row.faults[0])] += 1

    def merge(self, other: DataTally) -> None:
        """Add another tally to this one."""
        for name, counter in vars(self).items():
            if isinstance(counter, Counter):
                counter.update(getattr(other, name))
        self.faults.merge(other.faults)
        self.unreadable |= other.unreadable

    def summary(self) -> DataSummary:
        """The counts so far."""
        longest = max(self.lengths, default=0)
        alike: dict[str, Any] = {name: self.statuses[name] for name in STATUSES}
        alike |= {name: self.counts[name] for name in COUNTS}
        by_name = {name: dict(counter) for name, counter in vars(self).items() if isinstance(counter, Counter)}
        return DataSummary(
            rows=self.statuses.total(),
            faults=self.faults.count,
            examples=self.lengths.total(),
            tokens=sum(length * count for length, count in self.lengths.items()),
            supervised_tokens=self.supervised_by_source.total(),
            longest=longest,
            length_histogram=_histogram(self.lengths, longest),
            length_percentiles=[_percentile(self.lengths, share) for share in (0.5, 0.9, 0.99)],
            **alike | {name: by_name[name] for name in by_name.keys() & DataSummary.__annotations__},
        )


def _histogram(lengths: Counter[int], longest: int) -> list[int]:
    counts = [0] * HISTOGRAM_BINS
    for length, count in lengths.items():
        counts[min(length * HISTOGRAM_BINS // (longest + 1), HISTOGRAM_BINS - 1)] += count
    return counts


def _percentile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the examples does not exceed."""
    required, counted = share * lengths.total(), 0
    for length in sorted(lengths):
        counted += lengths[length]
        if counted >= required:
            return length
    return 0
