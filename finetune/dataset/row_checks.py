"""Check the texts and the order of turns, and apply the repairs that a caller asks for by name."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from finetune.conversation import Turn
from finetune.dataset.json_decoder import shown

REPAIRS = {
    "ignore_verdicts": "keys that say how good an answer is (row_verdicts.py) are not read",
    "merge_turns": "neighbouring turns of one role become one, with a blank line between their texts",
    "drop_last_human": "a human turn, or tool results, at the end, which nobody answers, are left out",
    "drop_duplicates": "a row that says exactly the same as an earlier one is left out",
    "undeclared_tools": "rows without declared tools may hold tool calls, which cannot be checked then",
}
# Characters that show nothing, in addition to what Python calls white space.
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_BLANK = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + INVISIBLE


def text_fault(text: Any, field: str) -> str | None:
    """Why a value cannot be the text of a turn; None if it can."""
    if not isinstance(text, str):
        parts = isinstance(text, list) and any(isinstance(part, dict) and "text" in part for part in text)
        remedy = "join the texts of its parts into one string" if parts else "write it as text, or leave the row out"
        return f'expected "{field}" to be a string, found {shown(text)}: {remedy}'
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


def repair_turns(
    numbered: list[tuple[int, Turn]], repairs: Collection[str]
) -> tuple[list[tuple[int, Turn]], tuple[str, ...]]:
    """Apply the named repairs to turns with their numbers in the row; return a description of each repair made."""
    done: list[str] = []
    if "merge_turns" in repairs:
        numbered, done = _merge_turns(numbered)
    while "drop_last_human" in repairs and len(numbered) > 1 and numbered[-1][1].role in ("human", "tool"):
        done.append(f"drop_last_human: turn {numbered[-1][0]}")
        if numbered.pop()[1].role == "human":
            break
    return numbered, tuple(done)


def _merge_turns(numbered: list[tuple[int, Turn]]) -> tuple[list[tuple[int, Turn]], list[str]]:
    merged, done = [], []
    for _, members in groupby(numbered, _mergeable):
        group = [*members]
        number, first = group[0]
        if len(group) > 1:
            first = replace(first, text="\n\n".join(turn.text for _, turn in group))
            numbers = [str(number) for number, _ in group]
            done.append(f"merge_turns: turns {', '.join(numbers[:-1])} and {numbers[-1]}")
        merged.append((number, first))
    return merged, done


def _mergeable(pair: tuple[int, Turn]) -> Any:
    """A key that neighbouring turns share which can be merged; calls, their results and reasoning cannot."""
    number, turn = pair
    if turn.role == "tool" or turn.tool_calls or turn.reasoning or "</think>" in turn.text:
        return number
    return turn.role, turn.train, turn.weight


def _reasoning_fault(turn: Turn) -> str | None:
    """Why a text is no answer with reasoning."""
    _, end, answer = turn.text.partition("</think>")
    if turn.reasoning and end:
        return "has reasoning beside the text and in it (</think>): leave one of them out"
    if not (turn.is_supervised and turn.text.lstrip().startswith("<think>")):
        return None
    if not end:
        return "begins with <think> and has no </think>: was it cut off? End its reasoning, or leave the row out"
    if is_blank(answer) and not turn.tool_calls:
        return "has reasoning and no answer behind it: add one, or leave the row out"
    return None


def order_faults(numbered: Sequence[tuple[int, Turn]], place: str) -> list[str]:
    """Faults in the order of a row's turns; where system turns stand and which side begins, the chat format decides."""
    if not numbered:
        return [f"{place}: has no turns: there is nothing to learn from it"]
    faults: list[str] = []
    is_supervised = [turn.train for _, turn in numbered if turn.role == "model" or turn.role == "text"]
    if not is_supervised:
        faults.append(f"{place}: has no model turn: there is nothing to learn from it")
    elif not any(is_supervised):
        faults.append(f'{place}: every model turn is "train": false: there is nothing to learn from it')
    before: Turn | None = None
    for number, turn in numbered:
        if turn.role == "system":
            continue
        if before is not None and before.role == turn.role and turn.role != "tool" and not before.tool_calls:
            differs = [key for key in ("train", "weight") if getattr(before, key) != getattr(turn, key)]
            remedy = ", or use --repairs merge_turns"
            if differs or before.reasoning or turn.reasoning or turn.tool_calls:
                remedy = f" (their {' and '.join(map(shown, differs))} differ)" if differs else ""
            faults.append(f"{place}, turn {number}: a second {turn.role} turn in a row: merge the two{remedy}")
        before = turn
    for number, turn in numbered:
        if turn.role == "model" and (turn.reasoning or "<think>" in turn.text) and (fault := _reasoning_fault(turn)):
            faults.append(f"{place}, turn {number}: {fault}")
    last, turn = numbered[-1]
    if is_supervised and (turn.role == "human" or turn.role == "tool"):
        faults.append(
            f"{place}, turn {last}: the last turn is {turn.role}, nobody answers it: leave it out, "
            "or use --repairs drop_last_human"
        )
    elif is_supervised and turn.role == "system" and len(numbered) > 1:
        faults.append(f"{place}, turn {last}: the last turn is system, nobody answers it: leave it out")
    return faults
