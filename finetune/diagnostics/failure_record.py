"""One failure of a run."""

from __future__ import annotations

import math
import re
import signal as signals
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

KINDS = ("error", "exception", "died", "stuck", "missing", "lost", "launcher", "stopped")
PHASES = ("start", "data", "meeting", "model", "step", "evaluation", "save", "end")
ERROR_LINES, TRACEBACK_LINES, OTHERS = 40, 60, 64
LINE_LENGTH = 2000


@dataclass(frozen=True)
class Failure:
    """What is known of one failure. Texts are cut to what a record needs, lists become tuples.

    Attributes:
        run: the run's id, "" where it had none yet.
        when: ISO 8601 with the offset from UTC.
        kind: `error` (an error with a message of ours), `exception` (any other), `died` (a process that ended
            without a word), `stuck` (no progress within the limit of its phase), `missing` (ranks that never came to
            the meeting), `lost` (the connection to a host ended), `launcher` (the `deepspeed` command or what it
            started died), `stopped` (it was asked to end).
        rank, host: where it happened, None where that is not one rank or one host.
        ranks, hosts: all that are involved, e.g. those that are missing.
        status: the exit status that the failure stands for.
        signal: what ended the process, None where nothing did.
        error: the message, its first 40 lines.
        traceback: its last 60 lines.
        phase: one of `PHASES`, "" where it is not known.
        step: optimizer step, None before the first.
        seconds: since the phase, or the step, began.
        hints: facts seen beside it, one a line: `oom_kill 0 -> 1`, `State: T (stopped)`, the path of a log.
        checkpoint: the newest whole one, "" where there is none.
        also: later failures of other ranks, one line each.
    """

    kind: str
    error: str = ""
    run: str = ""
    when: str = ""
    rank: int | None = None
    host: str | None = None
    ranks: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()
    status: int = 1
    signal: int | None = None
    phase: str = ""
    step: int | None = None
    seconds: float | None = None
    traceback: str = ""
    hints: tuple[str, ...] = ()
    checkpoint: str = ""
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        texts = {name: _clean(getattr(self, name)) for name in ("kind", "run", "when", "phase", "checkpoint")}
        lists = {name: tuple(_line(one) for one in getattr(self, name)) for name in ("hosts", "hints")}
        cut = {
            "error": _lines(self.error, ERROR_LINES, from_the_end=False),
            "traceback": _lines(self.traceback, TRACEBACK_LINES, from_the_end=True),
            "host": None if self.host is None else _line(self.host),
            "also": tuple(_line(one) for one in self.also)[:OTHERS],
            "ranks": tuple(self.ranks),
            "seconds": self.seconds if self.seconds is not None and 0 <= self.seconds < 1e12 else None,
        }
        for name, value in {**texts, **lists, **cut}.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """Every field, as standard JSON knows it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Failure:
        """The inverse of `to_json`; unknown keys, and values of another type than the field's, are left out.

        Raises:
            ValueError: `values` is no object with a `kind`.
        """
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise ValueError(f'expected an object with a "kind", found {str(values)[:80]!r}')
        known = {one.name: one.type for one in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and _fits(known[name], value)})

    def killed_by(self) -> int | None:
        """The signal that ended the process, told or read from a status of a kind in use: -9, 137, 247 are SIGKILL.

        247 is what launchers make of -9 (a status has 8 bits); 128 + n is the shells' way.
        """
        told = () if self.signal is None else (self.signal,)
        read_off = (-self.status, self.status - 128, 256 - self.status) if self.kind in ("died", "launcher") else ()
        return next((number for number in told or read_off if number in _SIGNALS), None)


_SIGNALS = {int(one) for one in signals.Signals if one < 32}


def moment(failure: Failure) -> float:
    """Seconds since 1970; infinite where `when` is no date: such a failure counts as later than any other."""
    try:
        return datetime.fromisoformat(re.sub(r"[Zz]$", "+00:00", failure.when)).timestamp()
    except (ValueError, OverflowError, OSError):
        return math.inf


def _fits(kind: str, value: Any) -> bool:
    if value is None:
        return "None" in kind
    if kind.startswith("tuple"):
        inner = int if "int" in kind else str
        return isinstance(value, list | tuple) and all(isinstance(one, inner) for one in value)
    if isinstance(value, bool):
        return False
    wanted = {"str": str, "int": int, "float": (int, float)}[kind.partition(" ")[0]]
    return isinstance(value, wanted)


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: names of files that are not UTF-8 arrive with lone surrogates."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _line(text: str) -> str:
    return " ".join(_clean(text).split())[:LINE_LENGTH].rstrip()


def _lines(text: str, count: int, *, from_the_end: bool) -> str:
    text = re.sub(r"(?m)^(\[rank\d+\]: ?)+", "", _clean(text).strip("\n"))  # torch puts it in front of every line
    lines = [line[:LINE_LENGTH].rstrip() for line in text.splitlines()]
    return "\n".join(lines[-count:] if from_the_end else lines[:count]).strip("\n")
