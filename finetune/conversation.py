"""What a conversation is once it has been read, and a row that could not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["human", "model", "system"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says; `text` is never blank. A model turn with `train` False is context, it is not learned."""

    role: Role
    text: str
    train: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: `row` counts from 0 in its source, bad rows too; `repairs` says which named rules changed it, where."""

    turns: tuple[Turn, ...]
    row: int
    source: str
    id: Any = None
    repairs: tuple[str, ...] = ()


def answer_number(turn: int) -> int:
    """Which answer of its conversation a model turn is, from 1: turns alternate, behind a system turn or none.

    A greeting, with which a conversation may begin, counts as part of the first answer.
    """
    return max(1, (turn + 1) // 2)


def to_row(turns: Sequence[Turn], id: Any = None) -> dict[str, Any]:
    """The turns in this project's own layout; without an id where there is none."""
    row: dict[str, Any] = {} if id is None else {"id": id}
    row["conversations"] = [
        {"from": turn.role, "value": turn.text} | ({} if turn.train else {"train": False}) for turn in turns
    ]
    return row


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row with faults, each a complete message with its place.

    `row` None: the file, or the rest of it, cannot be read at all; such a fault can never be dropped.
    """

    row: int | None
    source: str
    id: Any
    faults: tuple[str, ...]
