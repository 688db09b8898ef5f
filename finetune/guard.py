"""A rank never outlives its launcher.

`deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks. When one of the two is killed (by the kernel
for memory, by a scheduler), those below it run on by themselves: they keep their devices, the port and the output
folder, in which the next start of the same command then meets them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

DEEPSPEED = "deepspeed.launcher.launch"
LAUNCHERS = {DEEPSPEED, "torch.distributed.run", "torchrun"}
SECONDS_BETWEEN_LOOKS = 0.5
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_launcher() -> None:
    """From now on this process ends when its launcher does, and, under `deepspeed`, when that one's parent does.

    A process that no launcher has started, or that runs where there is no /proc, is left alone.
    """
    launcher = os.getppid()
    words = _command_of(launcher)
    if not LAUNCHERS & words:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    above = parent_of(launcher)
    if os.getppid() != launcher or above is None:  # it died meanwhile, before the kernel was told
        _end("the launcher")
    if DEEPSPEED in words:
        threading.Thread(target=_watch, args=(launcher, above), daemon=True, name="launcher's parent").start()


def parent_of(process: int) -> int | None:
    """The parent of a process, None where there is no such process (proc(5): the field behind state)."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _command_of(process: int) -> set[str]:
    """The words of its command line, those that are paths by their last part."""
    try:
        line = Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    except OSError:
        return set()
    return {word.rpartition("/")[2] for word in line.split("\0")}


def _watch(launcher: int, above: int) -> None:
    while parent_of(launcher) == above:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    _end("the launcher's parent, the deepspeed command")


def _end(what: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {what} has died: the ranks of this host end", file=sys.stderr, flush=True)
    os._exit(1)
