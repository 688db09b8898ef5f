"""Find duplicate ids and conversations by digest, in about 110 bytes of memory per row."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.conversation import Turn

# 15 bytes: with its header the object fills 48 bytes exactly, and a chance collision is out of the question.
DIGEST_BYTES = 15
_ROLE_BYTES = {
    ("human", True): b"h", ("model", True): b"m", ("system", True): b"s",
    ("human", False): b"H", ("model", False): b"M", ("system", False): b"S",
}  # fmt: skip


class DuplicateIndex:
    """Key -> the first row that had it.

    A bad row is replaced by a later good one, which therefore is no duplicate.
    """

    def __init__(self) -> None:
        self._rows: dict[Any, int] = {}

    def first(self, key: Any, row: int, is_bad: bool) -> int | None:
        """Return the earlier row that this one duplicates; remember this row if there is none."""
        first = self._rows.setdefault(key, ~row if is_bad else row)  # bad rows as their complement
        if first >= 0:
            return first if first != row else None
        if is_bad:
            return ~first if ~first != row else None
        self._rows[key] = row
        return None


def digest_of_row(row: Mapping[str, Any]) -> bytes | None:
    """A digest of a row in this project's format, for conversations of more than roles and texts; None: no JSON."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def digest_of_turns(turns: Sequence[Turn]) -> bytes:
    """A digest of the turns: roles, texts, and whether they are supervised."""
    parts: list[bytes] = []
    for turn in turns:
        text = turn.text.encode()
        parts += (_ROLE_BYTES[turn.role, turn.train], b"%d:" % len(text), text)
    return hashlib.blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def key_of_id(value: Any) -> Any:
    """A small key for an id; 1 and "1" differ."""
    if type(value) is int and -(2**62) < value < 2**62:
        return value
    text = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()
