"""Which row was the first to say something: duplicates found by a digest, about 110 bytes of memory a row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from finetune.conversation import Turn

# 15 bytes: with its header the object fills 48 bytes exactly, and chance finds no two alike.
DIGEST_BYTES = 15
_ROLE_BYTES = {
    ("human", True): b"h", ("model", True): b"m", ("system", True): b"s",
    ("human", False): b"H", ("model", False): b"M", ("system", False): b"S",
}  # fmt: skip


class DuplicateIndex:
    """Key -> the number of the first row that had it.

    A row that is bad anyway gives way to a later good one, which therefore is no duplicate.
    """

    def __init__(self) -> None:
        self._rows: dict[Any, int] = {}

    def first(self, key: Any, row: int, is_bad: bool) -> int | None:
        """The earlier row with this key, if it counts as this one's original; remembers this row otherwise."""
        before = self._rows.setdefault(key, ~row if is_bad else row)
        if before >= 0:
            return before if before != row else None
        if is_bad:
            return ~before if ~before != row else None
        self._rows[key] = row
        return None


def digest_of_turns(turns: Sequence[Turn]) -> bytes:
    """Equal for equal turns: who speaks, what is said, whether it is learned."""
    parts = []
    for turn in turns:
        text = turn.text.encode()
        parts += (_ROLE_BYTES[turn.role, turn.train], b"%d:" % len(text), text)
    return hashlib.blake2b(b"".join(parts), digest_size=DIGEST_BYTES).digest()


def key_of_id(value: Any) -> Any:
    """A small key for an id: 1 and "1" are two."""
    if type(value) is int and -(2**62) < value < 2**62:
        return value
    said = f"{type(value).__name__} {value}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(said, digest_size=DIGEST_BYTES).digest()
