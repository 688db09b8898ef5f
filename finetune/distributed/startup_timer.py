"""Where the seconds before the first step go: stages measure themselves, the plan says what they took."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.utils.proc import command_of, parent_of, stat_of

_stage_seconds: dict[str, float] = {}
_first_stage_began: list[float] = []


def timed(stage: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the seconds that the function takes are part of `start_up_seconds` under this name."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            if not _first_stage_began:
                _first_stage_began.append(time.monotonic())
            try:
                return function(*args, **kwargs)
            finally:
                _stage_seconds[stage] = _stage_seconds.get(stage, 0.0) + time.perf_counter() - began

        return measured

    return decorate


def start_up_seconds() -> dict[str, float]:
    """Seconds since the launcher was started, in parts: it, what came before the first timed stage, the timed stages,
    and the rest, which is the engine's."""
    own = launched = _age(process := os.getpid())
    while process := parent_of(process):
        if any("deepspeed" in word for word in command_of(process)):
            launched = max(launched, _age(process))
    before = own - (time.monotonic() - (_first_stage_began or [time.monotonic()])[0])
    parts = {"launcher": launched - own, "imports": before, **_stage_seconds}
    return {**parts, "engine": launched - sum(parts.values())}


def _age(process: int) -> float:
    """Seconds since a process began, 0 where it is gone. Field 22 of /proc/PID/stat counts clock ticks since boot."""
    fields = stat_of(process)
    if fields is None:
        return 0.0
    return float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
