"""Check the texts and the order of turns, and apply the repairs that a caller asks for by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from finetune.conversation import Turn
from finetune.dataset.json_decoder import shown

REPAIRS = {
    "ignore_verdicts": "keys that say how good an answer is (row_verdicts.py) are not read",
    "merge_turns": "neighbouring turns of one role become one, with a blank line between their texts",
    "drop_last_human": "a human turn at the end, which nobody answers, is left out",
}
# Characters that show nothing, in addition to what Python calls white space.
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_BLANK = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + INVISIBLE


def text_fault(text: Any, field: str) -> str | None:
    """Why a value cannot be the text of a turn; None if it can."""
    if not isinstance(text, str):
        parts = isinstance(text, list) and any(isinstance(part, dict) and "text" in part for part in text)
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
    """Why a text cannot be encoded: it holds a lone surrogate; None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f'"{field}" holds half a character (a lone surrogate) at position {error.start}: take it out'
    return None


def is_blank(text: str) -> bool:
    """Whether a text shows nothing."""
    return not text.strip(_BLANK)


def repair_turns(turns: Sequence[Turn], repairs: Collection[str]) -> tuple[list[tuple[int, Turn]], tuple[str, ...]]:
    """Apply the named repairs; the turns with their numbers in the row, and a description of each repair made."""
    numbered = list(enumerate(turns))
    done: list[str] = []
    if "merge_turns" in repairs:
        numbered, done = _merge_turns(numbered)
    if "drop_last_human" in repairs and len(numbered) > 1 and numbered[-1][1].role == "human":
        done.append(f"drop_last_human: turn {numbered[-1][0]}")
        numbered.pop()
    return numbered, tuple(done)


def _merge_turns(numbered: list[tuple[int, Turn]]) -> tuple[list[tuple[int, Turn]], list[str]]:
    merged, done = [], []
    for _, members in groupby(numbered, lambda pair: (pair[1].role, pair[1].train)):
        group = [*members]
        number, first = group[0]
        if len(group) > 1:
            first = Turn(first.role, "\n\n".join(turn.text for _, turn in group), first.train)
            numbers = [str(number) for number, _ in group]
            done.append(f"merge_turns: turns {', '.join(numbers[:-1])} and {numbers[-1]}")
        merged.append((number, first))
    return merged, done


def order_faults(numbered: Sequence[tuple[int, Turn]], place: str) -> list[str]:
    """Faults in the order of a row's turns; a row may begin with either side, the chat format decides."""
    if not numbered:
        return [f"{place}: has no turns: there is nothing to learn from it"]
    faults: list[str] = []
    is_supervised = [turn.train for _, turn in numbered if turn.role == "model"]
    if not is_supervised:
        faults.append(f"{place}: has no model turn: there is nothing to learn from it")
    elif not any(is_supervised):
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
    if is_supervised and before is not None and before.role == "human":
        faults.append(
            f"{place}, turn {numbered[-1][0]}: the last turn is human, nobody answers it: leave it out, "
            "or use --repairs drop_last_human"
        )
    return faults
