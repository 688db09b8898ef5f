"""The named rules by which a format may change what a conversation says; each use is written to the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.conversation import Turn

SYSTEM_SEPARATOR = "\n\n"
SYSTEM_RULE = "system turn put in front of the first human turn"
REASONING_RULE = "the chat template leaves out the reasoning of turn {turn}"
REASONING_END = "</think>"


def is_supervised(turn: Turn) -> bool:
    """Whether the labels hold this turn: a model's, and not marked as context."""
    return turn.role == "model" and turn.train


def system_in_front(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without their system turn, whose text now begins the human turn behind it."""
    system, first, *others = turns
    return [replace(first, text=system.text + SYSTEM_SEPARATOR + first.text), *others]
