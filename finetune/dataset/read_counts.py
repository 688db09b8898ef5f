"""Counts of what was read, by source, for the notes; counts of parts of the data add up."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from finetune.conversation import Conversation
from finetune.dataset.json_decoder import shown
from finetune.dataset.mojibake import MojibakeCounter
from finetune.dataset.row_formats import OWN_FORMAT
from finetune.dataset.row_reading import RowReading
from finetune.dataset.turn_reading import role_of

SHOWN_KEYS = 20
# Keys that may hold reasoning, or an explanation that is no part of the answer.
LIKE_REASONING = frozenset(
    "cot complex_cot chain_of_thought rationale rationales think thoughts thought_process reasoning_trace".split()
)


@dataclass
class ReadCounts:
    """Good rows by (source, format), turns by (source, role name), keys not read, and mojibake by source."""

    formats: Counter[tuple[str, str]] = field(default_factory=Counter)
    role_names: Counter[tuple[str, str]] = field(default_factory=Counter)
    unread: Counter[tuple[str, str]] = field(default_factory=Counter)
    mojibake: dict[str, MojibakeCounter] = field(default_factory=lambda: defaultdict(MojibakeCounter))

    def add(self, conversation: Conversation, reading: RowReading) -> None:
        """Count a good row."""
        source = conversation.source
        self.formats[source, reading.format] += 1
        for name in reading.role_names:
            self.role_names[source, name] += 1
        if reading.unread:
            self.unread.update((source, key) for key in {*reading.unread})
        self.mojibake[source].add([turn.text for turn in conversation.turns], conversation.row)

    def merge(self, other: ReadCounts) -> None:
        """Add the counts of later rows."""
        self.formats.update(other.formats)
        self.role_names.update(other.role_names)
        self.unread.update(other.unread)
        for source, counter in other.mojibake.items():
            self.mojibake[source].merge(counter)

    def notes(self) -> list[str]:
        """Lines for the user: other formats than this project's that were read, and sources with mojibake."""
        lines = []
        for (source, row_format), rows in self.formats.items():
            renamed = [
                f"{name} as {role_of(name)}"
                for owner, name in self.role_names
                if owner == source and name != role_of(name)
            ] if " of " in row_format and "COIG" not in row_format else []  # fmt: skip
            if row_format != OWN_FORMAT or renamed:
                names = f" ({', '.join(renamed)})" if renamed else ""
                lines.append(f"{source}: {rows:,} row{'s' * (rows != 1)} read as {row_format}{names}")
        for source in dict.fromkeys(source for source, _ in self.unread):
            keys = sorted((key, rows) for (owner, key), rows in self.unread.items() if owner == source)
            named = [f"{shown(key)[1:-1]} ({rows:,} row{'s' * (rows != 1)})" for key, rows in keys[:SHOWN_KEYS]]
            more = [f"{len(keys) - SHOWN_KEYS:,} more"] if len(keys) > SHOWN_KEYS else []
            thoughts = [key for key, _ in keys if key.lower() in LIKE_REASONING]
            hint = f"; if {thoughts[0]} is reasoning: --columns reasoning={thoughts[0]}" if thoughts else ""
            lines.append(f"{source}: keys not read: {', '.join([*named, *more])}{hint}")
        return lines + [note for name, counter in self.mojibake.items() if (note := counter.note(name)) is not None]
