"""A request to stop: SIGTERM, SIGUSR1 or SIGINT to any rank, or a file `STOP` in the output folder.

A scheduler that takes a machine away says so first. The ranks agree on a step (see `callbacks`), save it, and leave
with status 75, which says: run the same command again. A second signal is a user, or a scheduler, who does not wait.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of <sysexits.h>
STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_BETWEEN_LOOKS = 1.0


class _Request:
    """What this process has heard so far."""

    signal_number: int | None = None
    by_file = False
    can_save = False  # a step has begun: from now on there is something to save
    leaves = False  # saved, or done: later signals change nothing
    file: Path | None = None
    looked_at = 0.0


_request = _Request()


def install_signal_handlers() -> None:
    """From now on the signals ask to stop instead of ending this process; the main thread's to call."""
    for number in SIGNALS:
        signal.signal(number, _heard)


def watch_stop_file(stop_file: Path | None) -> None:
    """The first step begins: a request now waits for the end of a step. `stop_file` is looked for, too."""
    _request.can_save, _request.file = True, stop_file


def ignore_signals() -> None:
    """What was to be saved is saved: further signals change nothing."""
    _request.leaves = True


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    if _request.signal_number is not None or _request.by_file:
        return True
    now = time.monotonic()
    if _request.file is not None and now - _request.looked_at >= SECONDS_BETWEEN_LOOKS:
        _request.looked_at = now
        _request.by_file = _request.file.exists()
    return _request.by_file


def stop_reason() -> str | None:
    """What asked, in words; None where nothing has."""
    if _request.signal_number is not None:
        return signal.Signals(_request.signal_number).name
    return str(_request.file) if _request.by_file else None


def reset() -> None:
    """As if nothing had been asked; for a process that trains more than once."""
    global _request
    _request = _Request()


def ignore_in_worker(_: int) -> None:
    """For processes that load data: they end with their rank, and not by a signal that is meant for it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _heard(number: int, _: Any) -> None:
    again, _request.signal_number = _request.signal_number is not None, number
    if _request.leaves:
        return
    name = signal.Signals(number).name
    if not _request.can_save:
        _request.leaves = True
        _say(f"{name}: nothing was trained yet, nothing is saved")
        raise SystemExit(EXIT_STOPPED)
    if again:
        _say(f"{name}, the second signal: leaving at once, nothing is saved")
        os._exit(128 + number)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _say(f"{name}: saving at the end of this step, then leaving; once more to leave at once")


def _say(line: str) -> None:
    # a print may have been interrupted by the very signal, and does not let another one in
    os.write(2, f"{line}\n".encode())
