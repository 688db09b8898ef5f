"""The record of one failure of a run."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, get_type_hints

from finetune.utils.user_files import has_type

KINDS = ("error", "exception", "died", "stuck", "missing", "lost", "launcher")
PHASES = ("start", "data", "rendezvous", "model", "step", "evaluation", "save", "end")
BEFORE_TRAINING = ("start", "data", "rendezvous", "model")
RENAMED_PHASES = {"meeting": "rendezvous"}  # in records of version 0.1
ERROR_LINES, TRACEBACK_LINES, LINE_LENGTH, ALSO_LENGTH = 40, 60, 2000, 64
SIGNALS = frozenset(int(number) for number in signal.Signals if number < 32)


@dataclass(frozen=True)
class Failure:
    """What is known about one failure. Long texts are cut, sequences become tuples.

    Its kind is `error` (an error with a message of this project), `exception` (any other), `died` (a process that ended
    without a message), `stuck` (no progress within the limit of its phase), `missing` (ranks that did not reach the
    rendezvous), `lost` (the connection to a host ended) or `launcher` (a process that started ranks ended).
    """

    kind: str
    error: str = ""  # the first 40 lines of the message
    run: str = ""  # id of the run, "" before it has one
    when: str = ""  # ISO 8601 with the offset from UTC
    rank: int | None = None  # None if it is not one rank
    host: str | None = None
    ranks: Sequence[int] = ()  # all that are involved, for instance those that are missing
    hosts: Sequence[str] = ()
    status: int = 1  # exit status that the failure stands for
    signal: int | None = None  # that ended the process
    phase: str = ""  # one of `PHASES`, "" if unknown
    step: int | None = None  # optimizer step, None before the first
    seconds: float | None = None  # since the phase or step began
    traceback: str = ""  # its last 60 lines
    hints: Sequence[str] = ()  # observations beside the failure, a line each: `oom_kill 0 -> 1`, `State: T (stopped)`
    checkpoint: str = ""  # newest complete one, "" if there is none
    also: Sequence[str] = ()  # later failures of other ranks, one line each

    def __post_init__(self) -> None:
        values: dict[str, Any] = {
            name: _utf8_text(getattr(self, name)) for name in ("kind", "run", "when", "phase", "checkpoint")
        }
        values |= {name: tuple(map(_one_line, getattr(self, name))) for name in ("hosts", "hints", "also")}
        values |= {
            "phase": RENAMED_PHASES.get(values["phase"], values["phase"]),
            "error": "\n".join(_cleaned_lines(self.error)[:ERROR_LINES]).strip("\n"),
            "traceback": "\n".join(_cleaned_lines(self.traceback)[-TRACEBACK_LINES:]).strip("\n"),
            "host": None if self.host is None else _one_line(self.host),
            "also": values["also"][:ALSO_LENGTH],
            "ranks": tuple(self.ranks),
            "seconds": self.seconds if self.seconds is not None and 0 <= self.seconds < 1e12 else None,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as values of standard JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: object) -> Failure:
        """Invert `to_json`. Unknown keys, and values of another type than the field's, are left out."""
        if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
            raise ValueError(f'expected an object with a "kind", got {str(values)[:80]!r}')
        hints = get_type_hints(cls)
        return cls(**{name: value for name, value in values.items() if name in hints and has_type(value, hints[name])})

    def is_said(self) -> bool:
        """Whether the `error: ...` of its rank says all: an error before the first step."""
        return self.kind == "error" and self.phase in BEFORE_TRAINING

    def killed_by(self) -> int | None:
        """Return the signal that ended the process, also as read from an exit status: -9, 137 and 247 are SIGKILL.

        Shells exit with 128 + n; launchers turn -9 into 247, because a status has 8 bits.
        """
        given = [] if self.signal is None else [self.signal]
        if self.kind in ("died", "launcher"):
            given += [-self.status, self.status - 128, 256 - self.status]
        return next((number for number in given if number in SIGNALS), None)

    def timestamp(self) -> float:
        """Return `when` in seconds since 1970, infinity if it is no date: such a failure counts as the latest."""
        try:
            return datetime.fromisoformat(self.when).timestamp()
        except (ValueError, OverflowError, OSError):
            return math.inf


def _utf8_text(text: object) -> str:
    """Return text without lone surrogates, which file names that are not UTF-8 bring."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def _one_line(text: object) -> str:
    return " ".join(_utf8_text(text).split())[:LINE_LENGTH].rstrip()


def _cleaned_lines(text: str) -> list[str]:
    """Return the lines without torch's `[rank0]: ` in front."""
    text = re.sub(r"(?m)^(\[rank\d+\]: ?)+", "", _utf8_text(text).strip("\n"))
    return [line[:LINE_LENGTH].rstrip() for line in text.splitlines()]
