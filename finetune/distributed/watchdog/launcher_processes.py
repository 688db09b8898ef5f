"""A rank never outlives its launcher, and knows what its launcher was told.

`deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks. When one of the two is killed (by the kernel
for memory, by a scheduler), those below it run on by themselves: they keep their devices, the port and the output
folder, in which the next start of the same command then meets them.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable

from finetune.utils.proc import POLL_SECONDS, command_of, die_with_parent, parent_of

DEEPSPEED = "deepspeed.launcher.launch"
RUNNERS = {"deepspeed", "ds", "deepspeed.launcher.runner"}
LAUNCHERS = {DEEPSPEED, "torch.distributed.run", "torchrun"}


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
        time.sleep(POLL_SECONDS)
    end("the launcher's parent, the deepspeed command")
