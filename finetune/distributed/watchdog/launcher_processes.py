"""The launcher processes above a rank: the rank ends with them, and reads their arguments.

`deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks. If one of the two is killed (by the kernel for
lack of memory, by a scheduler), its children keep running: they occupy the devices, the port and the output folder
when the same command is started again.
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
    """End this process when its launcher ends and, under `deepspeed`, when the launcher's parent ends.

    `end` receives what has died, and must not return. Returns the launcher's process id; None for a process that no
    launcher has started, or without /proc.
    """
    launcher = os.getppid()
    words = command_of(launcher)
    if not LAUNCHERS & {word.rpartition("/")[2] for word in words}:
        return None
    die_with_parent()
    runner = parent_of(launcher)
    if os.getppid() != launcher or runner is None:  # it died before the kernel was told
        end("the launcher")

    def watch_runner() -> None:
        while parent_of(launcher) == runner:
            time.sleep(POLL_SECONDS)
        end("the launcher's parent, the deepspeed command")

    if DEEPSPEED in words:
        threading.Thread(target=watch_runner, daemon=True, name="launcher's parent").start()
    return launcher


def world_info_of(launcher: int | None) -> dict[str, list[int]]:
    """Return host -> slots in the order of the ranks, as `deepspeed` told its launcher; empty if that is unknown."""
    for word in command_of(launcher) if launcher else ():
        name, _, value = word.partition("=")
        if name == "--world_info":
            try:
                return json.loads(base64.urlsafe_b64decode(value))
            except ValueError:
                return {}
    return {}


def runner_arguments(launcher: int | None) -> list[str] | None:
    """Return the arguments of this host's `deepspeed` command; None if there is none, or on another machine."""
    runner = parent_of(launcher) if launcher else None
    words = command_of(runner) if runner else []
    for index, word in enumerate(words[:4]):
        if word.rpartition("/")[2] in RUNNERS:
            return words[index + 1 :]
    return None
