"""The types that all packages share: turns, conversations, and rows that could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Role = Literal["human", "model", "system"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `text` is never blank. A model turn with `train` False is context."""

    role: Role
    text: str
    train: bool = True

    @property
    def is_supervised(self) -> bool:
        """Whether the labels hold this turn."""
        return self.role == "model" and self.train


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: `row` counts from 0 in its source, bad rows included; `repairs` describes the repairs made."""

    turns: tuple[Turn, ...]
    row: int
    source: str
    id: Any = None
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row with faults, each a complete message with its place.

    `row` None: the file, or the rest of it, cannot be read at all; such a fault can never be dropped.
    """

    row: int | None
    source: str
    id: Any
    faults: tuple[str, ...]
    status: ClassVar[Literal["dropped"]] = "dropped"

    @property
    def reason(self) -> str:
        """All faults, for the ledger."""
        return "; ".join(self.faults)


def answer_number(turn: int) -> int:
    """The number of the answer that model turn `turn` is in its conversation, from 1.

    Turns alternate, after an optional system turn. A greeting that begins a conversation counts as part of answer 1.
    """
    return max(1, (turn + 1) // 2)


def to_row(turns: Sequence[Turn], id: Any = None) -> dict[str, Any]:
    """The turns in this project's own row format; without the key "id" if it is None."""
    row: dict[str, Any] = {} if id is None else {"id": id}
    row["conversations"] = [
        {"from": turn.role, "value": turn.text} | ({} if turn.train else {"train": False}) for turn in turns
    ]
    return row
