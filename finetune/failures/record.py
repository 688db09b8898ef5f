"""What is known of a run that failed, and the file that keeps it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE = "failure.json"
TRACEBACK_LINES = 60
# What the other ranks say when one has died: gloo, NCCL, torch's store.
ECHOES = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|socket ?timeout|remote process exited|nccl.*(abort|remote)|"
    r"work.*was aborted|recvvalue failed|connection refused|peer closed|end of file|gloo.*(timed? ?out|timeout)",
    re.IGNORECASE | re.DOTALL,
)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong.

    Attributes:
        kind: "error" (a message of ours), "exception" (an unexpected one), "died" (a process ended without a word),
            "stuck", "missing" (ranks that never arrived), "lost" (a host whose connection ended), "launcher" (the
            deepspeed command or its launcher died).
        status: the exit status that it stands for.
        phase, step, seconds: where the rank was, and for how long.
        rank, host: of the one to blame, None where it is not one; ranks, hosts: all that are concerned.
        also: what other ranks said later, one line each.
    """

    kind: str
    error: str = ""
    status: int = 1
    rank: int | None = None
    host: str | None = None
    ranks: list[int] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    phase: str | None = None
    step: int | None = None
    seconds: float | None = None
    traceback: str | None = None
    also: list[str] = field(default_factory=list)
    run: str = ""
    when: str = field(default_factory=_now)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a long traceback by its end."""
        values = asdict(self)
        if self.traceback:
            values["traceback"] = "\n".join(self.traceback.splitlines()[-TRACEBACK_LINES:])
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Failure:
        """What `to_json` gave; keys of later versions are left out."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def is_consequence(text: str) -> bool:
    """Whether an error reads like the echo of another rank's death."""
    return bool(ECHOES.search(text))


def first_of(failures: Sequence[Failure]) -> Failure:
    """Of several, in the order of their arrival, the one that the others follow from."""
    causes = [one for one in failures if not is_consequence(one.error)] or list(failures)
    words = [one for one in causes if one.kind in ("error", "exception")]
    first = causes[0]
    # A rank that told what happened to it says more than the guard that saw it go.
    first = next((one for one in words if one.rank == first.rank), first)
    others = [one for one in failures if one.error != first.error and (one.rank is None or one.rank != first.rank)]
    lines = [f"rank {one.rank} on {one.host}: {_first_line(one.error)}" for one in others]
    return Failure.from_json({**first.to_json(), "also": [*first.also, *lines]})


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["(nothing)"])[0][:200]


def write(folder: Path, failure: Failure, extra: dict[str, Any]) -> Path | None:
    """Leave `failure.json` in `folder`, whole or not at all; None where the disk refuses: the run has failed anyhow."""
    path = folder / FILE
    scratch = folder / f".{FILE}.{os.getpid()}"
    try:
        with scratch.open("w", encoding="utf-8") as file:
            json.dump({**failure.to_json(), **extra}, file, ensure_ascii=False, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except (OSError, ValueError):
        with suppress(OSError):
            scratch.unlink()
        return None
    return path


def read(path: Path) -> Failure | None:
    """A record, None where there is none that can be read."""
    try:
        return Failure.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
