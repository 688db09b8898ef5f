"""What turns must be to be learned from: their texts, their order, the repairs that a caller may ask for by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from finetune.conversation import Turn
from finetune.dataset.json_decoder import shown

REPAIRS = {
    "merge_turns": "neighbouring turns of one role become one, with a blank line between their texts",
    "drop_last_human": "a human turn at the end, which nobody answers, is left out",
}
# Characters that show nothing, beside what Python calls white space.
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_BLANK = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + INVISIBLE


def text_fault(text: Any, field: str) -> str | None:
    """Why a text cannot be a turn's; None where it can."""
    if not isinstance(text, str):
        parts = isinstance(text, list) and any(isinstance(one, dict) and "text" in one for one in text)
        remedy = ": join the texts of its parts into one string" if parts else ""
        return f'expected "{field}" to be a string, found {shown(text)}{remedy}'
    if not text.strip(_BLANK):
        return f'"{field}" is empty: say something or leave it out'
    if "\0" in text:
        return f'"{field}" holds a NUL character at position {text.index(chr(0))}: take it out'
    if not text.isascii():
        return surrogate_fault(text, field)
    return None


def surrogate_fault(text: str, field: str) -> str | None:
    """Where a text holds half a character, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f'"{field}" holds half a character (a lone surrogate) at position {error.start}: take it out'
    return None


def is_blank(text: str) -> bool:
    """Whether a text shows nothing."""
    return not text.strip(_BLANK)


def repaired(turns: Sequence[Turn], repairs: Collection[str]) -> tuple[list[tuple[int, Turn]], tuple[str, ...]]:
    """The turns with their numbers in the row, after the repairs asked for, and what was done."""
    numbered, done = list(enumerate(turns)), []
    if "merge_turns" in repairs:
        numbered, done = _merged(numbered)
    if "drop_last_human" in repairs and len(numbered) > 1 and numbered[-1][1].role == "human":
        done.append(f"drop_last_human: turn {numbered[-1][0]}")
        numbered.pop()
    return numbered, tuple(done)


def _merged(numbered: list[tuple[int, Turn]]) -> tuple[list[tuple[int, Turn]], list[str]]:
    groups: list[list[tuple[int, Turn]]] = []
    for number, turn in numbered:
        before = groups[-1][-1][1] if groups else None
        if before is not None and (before.role, before.train) == (turn.role, turn.train):
            groups[-1].append((number, turn))
        else:
            groups.append([(number, turn)])
    merged, done = [], []
    for group in groups:
        number, first = group[0]
        if len(group) > 1:
            first = Turn(first.role, "\n\n".join(turn.text for _, turn in group), first.train)
            numbers = [str(number) for number, _ in group]
            done.append(f"merge_turns: turns {', '.join(numbers[:-1])} and {numbers[-1]}")
        merged.append((number, first))
    return merged, done


def order_faults(numbered: Sequence[tuple[int, Turn]], place: str) -> list[str]:
    """What is wrong with the turns of a row as a whole; a row may begin with either side, the chat format decides."""
    if not numbered:
        return [f"{place}: has no turns: there is nothing to learn from it"]
    faults: list[str] = []
    learned = [turn.train for _, turn in numbered if turn.role == "model"]
    if not learned:
        faults.append(f"{place}: has no model turn: there is nothing to learn from it")
    elif not any(learned):
        faults.append(f'{place}: every model turn is "train": false: there is nothing to learn from it')
    before: Turn | None = None
    for number, turn in numbered:
        if before is not None and turn.role == "system":
            second = before.role == "system"
            remedy = "merge the two" if second else "put its text first, or make it a human turn"
            faults.append(f"{place}, turn {number}: a system turn can only be the first, and only one: {remedy}")
        elif before is not None and before.role == turn.role:
            alike = before.train == turn.train
            faults.append(
                f"{place}, turn {number}: a second {turn.role} turn in a row: "
                + ("merge the two, or use --repairs merge_turns" if alike else 'merge the two (their "train" differs)')
            )
        before = turn
    if learned and before is not None and before.role == "human":
        faults.append(
            f"{place}, turn {numbered[-1][0]}: the last turn is human, nobody answers it: leave it out, "
            "or use --repairs drop_last_human"
        )
    return faults
