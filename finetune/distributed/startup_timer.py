"""Where the seconds before the first step go: stages measure themselves, the run summary shows them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.utils.proc import command_of, parent_of, stat_of

_stage_seconds: dict[str, float] = {}
_first_stage_began: list[float] = []  # empty, or one time


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Count the seconds of the function that this decorates as a stage of `start_up_seconds`."""
    began = time.perf_counter()
    if not _first_stage_began:
        _first_stage_began.append(time.monotonic())
    try:
        yield
    finally:
        _stage_seconds[stage] = _stage_seconds.get(stage, 0.0) + time.perf_counter() - began


def start_up_seconds() -> dict[str, float]:
    """Return the seconds since the launcher was started, by part.

    The parts: `launcher`, `imports` (what came before the first timed stage), each stage, `engine` (the rest).
    """
    pid: int | None = os.getpid()
    own_age = launcher_age = _age(os.getpid())
    while pid and (pid := parent_of(pid)):
        if any("deepspeed" in word for word in command_of(pid)):
            launcher_age = max(launcher_age, _age(pid))
    before = own_age - (time.monotonic() - (_first_stage_began or [time.monotonic()])[0])
    parts = {"launcher": launcher_age - own_age, "imports": before, **_stage_seconds}
    return {**parts, "engine": launcher_age - sum(parts.values())}


def _age(pid: int) -> float:
    """Seconds since a process began, 0 if it is gone. Field 22 of /proc/PID/stat counts clock ticks since boot."""
    fields = stat_of(pid)
    if fields is None:
        return 0.0
    return float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
