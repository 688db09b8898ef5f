"""Processes of this machine: commands that start ours, and what /proc says of others, see proc(5)."""

import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the clone: the folder that holds `finetune/`
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def shipped_folder(name: str) -> Path:
    """A folder of data or configs of this project: beside the package in a clone, inside it once installed."""
    installed = ROOT / "finetune" / name
    return installed if installed.is_dir() else ROOT / name


def cache_folder(name: str) -> Path:
    """Make and return a folder in $XDG_CACHE_HOME/finetune, by default in ~/.cache; in /tmp if that is not writable."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, a user without one
        return Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}" / name
    return folder


def command_calling(*functions: Callable[[], Any]) -> list[str]:
    """The command that calls module-level functions of this package in a new process, on any host with this clone."""
    imports = "; ".join(f"from {function.__module__} import {function.__name__}" for function in functions)
    calls = "; ".join(f"{function.__name__}()" for function in functions)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {imports}; {calls}"]


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once if `parent` has ended."""
    receive_at_parents_end(signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def receive_at_parents_end(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on: state, parent, group, session, ...; None if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None


def state_of(pid: int) -> str:
    """R, S, D, T, Z, ...; "?" for a process that is gone."""
    fields = stat_of(pid)
    return fields[0] if fields else "?"


def parent_of(pid: int) -> int | None:
    """The parent's process id; None if there is no such process."""
    fields = stat_of(pid)
    return int(fields[1]) if fields else None


def started_at(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot: with its id, a name that is never used again."""
    fields = stat_of(pid)
    return fields[19] if fields else None


def was_adopted(pid: int) -> bool:
    """Return whether a process has lost its parent: the present one is of a session that it cannot have left."""
    fields = stat_of(pid)
    parent = stat_of(int(fields[1])) if fields else None
    return bool(fields and parent and fields[3] != str(pid) and fields[3] != parent[3])


def command_of(pid: int) -> list[str]:
    """The words of a process's command line; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []
