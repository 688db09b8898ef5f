"""The launcher processes above a rank: the rank ends with them, and reads their arguments.

`deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks. If one of the two is killed (by the kernel for
lack of memory, by a scheduler), its children keep running: they occupy the devices, the port and the output folder
when the same command is started again.
"""

import base64
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from finetune.distributed import stop_requests
from finetune.utils.proc import POLL_SECONDS, command_of, die_with_parent, parent_of, started_at, was_adopted

DEEPSPEED = "deepspeed.launcher.launch"
RUNNERS = {"deepspeed", "ds", "deepspeed.launcher.runner"}
LAUNCHERS = {DEEPSPEED, "torch.distributed.run", "torchrun"}
SET_BY_LAUNCHERS = {"CROSS_SIZE", "TORCHELASTIC_RUN_ID"}  # deepspeed.launcher.launch, torchrun
COMMAND = "the launcher's parent, the deepspeed command"
PARENT = "FINETUNE_PARENT"  # "PID:START" of the `finetune launch` process of this host, or of its agent
_reports: list[Callable[[str], None]] = []
_launchers: list[int | None] = []  # of this process, once it is known


def die_with_launcher(report: Callable[[str], None] | None = None) -> None:
    """End this process when its launcher ends and, under `deepspeed`, when the launcher's parent ends.

    A rank calls it before its slow imports, in which time its launcher may die, and again with `report`, which then
    receives what has died. Nothing happens in a process that no launcher has started, or without /proc.
    """
    _reports[:] = [report] if report else []
    if not _launchers:
        _launchers.append(_watch_launcher())


def _watch_launcher() -> int | None:
    launcher = os.getppid()
    words = command_of(launcher)
    if not LAUNCHERS & {word.rpartition("/")[2] for word in words}:
        is_gone = launcher == 1 or not words or was_adopted(os.getpid())  # no words: it is dying
        if is_gone and os.environ.keys() & SET_BY_LAUNCHERS:
            _end("the launcher")
        return None
    die_with_parent()
    runner = parent_of(launcher)
    if os.getppid() != launcher or runner is None:  # it died before the kernel was told
        _end("the launcher")
    if DEEPSPEED not in words:
        return launcher
    pid, _, start = os.environ.get(PARENT, "").partition(":")
    if _runner_words(runner) is None and (runner == 1 or was_adopted(launcher)):
        _end(COMMAND)

    def watch_runner() -> None:
        while parent_of(launcher) == runner and (not start or started_at(int(pid)) == start):
            time.sleep(POLL_SECONDS)
        if (
            not stop_requests.was_interrupted()
        ):  # Ctrl-C ends the command; the launcher waits until the ranks have saved
            _end(COMMAND)

    threading.Thread(target=watch_runner, daemon=True, name="launcher's parent").start()
    return launcher


def _end(process: str) -> NoReturn:
    for report in _reports:
        report(process)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"error: {process} has died: the ranks of this host end\n".encode())
    os._exit(1)


def launcher_pid() -> int | None:
    """Return the process that started this rank, once `die_with_launcher` has found it."""
    return _launchers[0] if _launchers else None


def world_info() -> dict[str, list[int]]:
    """Return host -> slots in the order of the ranks, as `deepspeed` told its launcher; empty if that is unknown."""
    launcher = launcher_pid()
    for word in command_of(launcher) if launcher else ():
        name, _, value = word.partition("=")
        if name == "--world_info":
            try:
                return json.loads(base64.urlsafe_b64decode(value))
            except ValueError:
                return {}
    return {}


def runner_arguments() -> list[str] | None:
    """Return the arguments of this host's `deepspeed` command; None if there is none, or on another machine."""
    launcher = launcher_pid()
    runner = parent_of(launcher) if launcher else None
    return _runner_words(runner) if runner else None


def _runner_words(pid: int | None) -> list[str] | None:
    words = command_of(pid) if pid else []
    for index, word in enumerate(words[:4]):
        if word.rpartition("/")[2] in RUNNERS:
            return words[index + 1 :]
    return None
