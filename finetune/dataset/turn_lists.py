"""Lists of turns, as values and in the forms in which tables hold them: JSON, Python literals, objects of lists."""

import re
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from finetune.dataset.json_decoder import decode_literal
from finetune.dataset.turn_reading import TURN_KEYS, role_of

_LIST = re.compile(r"""\s*\[\s*["'\[{]""")


def is_turns(value: Any) -> bool:
    """Whether a value is a turn, or a list with one."""
    turns = value if isinstance(value, list) else [value]
    return any(isinstance(turn, dict) and not {*TURN_KEYS, "call_id"}.isdisjoint(turn) for turn in turns)


def is_listed(value: Any) -> bool:
    """Whether a value is a list, or the JSON or Python literal of one that holds texts, lists or objects."""
    return type(value) is list or (isinstance(value, str) and _LIST.match(value) is not None)


def listed_turns(value: Any) -> Any:
    """Decode a list of turns, or each turn, from JSON, a Python literal or an object of lists; keep other values.

    Raises:
        ValueError, RecursionError: a text that is neither.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = decode_literal(value)
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        turns = turns_in_text(f"[{', '.join(value)}]") if value[0].lstrip().startswith("{") else None
        return turns if isinstance(turns, list) else value
    columns = {key: column for key, column in value.items() if column is not None} if isinstance(value, dict) else {}
    if columns and all(isinstance(column, list) for column in columns.values()):
        return [dict(zip(columns, turn, strict=True)) for turn in zip_longest(*columns.values())]
    return value


def turns_in_text(text: str) -> Any:
    """The list of turns that a text is as JSON, as tables have it; any other text as it is."""
    if is_listed(text):
        with suppress(ValueError, RecursionError):
            turns = listed_turns(text)
            if all(isinstance(turn, dict) and role_of(turn.get("role") or turn.get("from")) for turn in turns):
                return turns
    return text
