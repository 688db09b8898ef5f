"""A rank never outlives its launcher, and knows what its launcher was told.

`deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks. When one of the two is killed (by the kernel
for memory, by a scheduler), those below it run on by themselves: they keep their devices, the port and the output
folder, in which the next start of the same command then meets them.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

DEEPSPEED = "deepspeed.launcher.launch"
RUNNERS = {"deepspeed", "ds", "deepspeed.launcher.runner"}
LAUNCHERS = {DEEPSPEED, "torch.distributed.run", "torchrun"}
SECONDS_BETWEEN_LOOKS = 0.5
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent() -> None:
    """From now on the kernel ends this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def die_with_launcher(end: Callable[[str], None]) -> int | None:
    """From now on this process ends when its launcher does, and, under `deepspeed`, when that one's parent does.

    `end` is told what has died, and must not return. Returns the launcher's process id; None for a process that no
    launcher has started, or that runs where there is no /proc: it is left alone.
    """
    launcher = os.getppid()
    words = command_of(launcher)
    if not LAUNCHERS & _names(words):
        return None
    die_with_parent()
    above = parent_of(launcher)
    if os.getppid() != launcher or above is None:  # it died meanwhile, before the kernel was told
        end("the launcher")
    if DEEPSPEED in words:
        threading.Thread(target=_watch, args=(launcher, above, end), daemon=True, name="launcher's parent").start()
    return launcher


def parent_of(process: int) -> int | None:
    """The parent of a process, None where there is no such process (proc(5): the field behind state)."""
    fields = stat_of(process)
    return int(fields[1]) if fields else None


def stat_of(process: int) -> list[str] | None:
    """The fields of /proc/N/stat from the state on: state, parent, process group, session, ... (proc(5))."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None


def command_of(process: int) -> list[str]:
    """The words of a process's command line; none where it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def world_info_of(launcher: int | None) -> dict[str, list[int]]:
    """Hosts and their slots, in the order of the ranks, as `deepspeed` told its launcher; empty where it is unknown."""
    for word in command_of(launcher) if launcher else ():
        name, _, value = word.partition("=")
        if name == "--world_info":
            try:
                return json.loads(base64.urlsafe_b64decode(value))
            except ValueError:
                return {}
    return {}


def runner_arguments(launcher: int | None) -> list[str] | None:
    """What the `deepspeed` command of this host was given, None where another machine or nobody gave it."""
    above = parent_of(launcher) if launcher else None
    words = command_of(above) if above else []
    for place, word in enumerate(words[:4]):
        if word.rpartition("/")[2] in RUNNERS:
            return words[place + 1 :]
    return None


def _names(words: list[str]) -> set[str]:
    return {word.rpartition("/")[2] for word in words}


def _watch(launcher: int, above: int, end: Callable[[str], None]) -> None:
    while parent_of(launcher) == above:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    end("the launcher's parent, the deepspeed command")
