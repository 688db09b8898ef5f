"""What is known to go wrong, as tables: how it shows itself, what it means, what to do."""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """A cause and how it shows itself. All that is given must hold.

    Attributes:
        title, why, do: for the reader: what it is, why it happens, what to type or change.
        seen: a regular expression for the error, its hints and the messages in its traceback, case ignored.
        stack: a regular expression for the whole traceback.
        kinds, phases, signals: those of the failure; () is any.
    """

    title: str
    why: str
    do: str
    seen: str = ""
    stack: str = ""
    kinds: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    signals: tuple[int, ...] = ()
