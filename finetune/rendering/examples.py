"""What rendering makes: examples with their labels, and the layout they grow from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from finetune.conversations import Turn

IGNORE_INDEX = -100

Status = Literal["kept", "cut", "split", "dropped"]


@dataclass(frozen=True)
class TurnSpan:
    """Where a turn lies in an example: tokens `start` to `stop` (exclusive), its end-of-turn token included."""

    turn: int
    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Example:
    """One training sequence.

    `input_ids` and `labels` are lists of the same length; `labels[i]` is -100 or what position i should have been
    predicted as (position i-1 predicts it; position 0 is predicted by nothing and always -100). `row` and `source`
    say which conversation it is, `window` which part of it.
    """

    input_ids: list[int]
    labels: list[int]
    row: int
    source: str
    window: int = 0
    turn_spans: tuple[TurnSpan, ...] = ()

    @property
    def num_supervised(self) -> int:
        """Positions that are learned."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class Rendering:
    """What became of one conversation: its examples (none when dropped) and, unless all is plain, the reason."""

    row: int
    id: Any
    status: Status
    examples: tuple[Example, ...]
    reason: str | None = None


@dataclass
class Layout:
    """A conversation laid out as tokens; grows piece by piece."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[TurnSpan] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, learned: bool) -> None:
        """Append ids, all of them learned or all of them context."""
        self.input_ids += ids
        self.labels += ids if learned else [IGNORE_INDEX] * len(ids)


class ChatFormat(Protocol):
    """How turns become tokens."""

    name: str
    rule: str | None

    def lay_out(self, turns: Sequence[Turn]) -> Layout:
        """Lay the turns out; raises `Unrenderable` where the format cannot express them."""
        ...


class Unrenderable(Exception):
    """The format cannot express this conversation; the message is the reason alone."""
