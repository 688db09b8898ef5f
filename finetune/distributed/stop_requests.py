"""Requests to stop: SIGTERM, SIGUSR1 or SIGINT to any rank, or a file `STOP` in the output folder.

A scheduler sends a signal before it takes a machine away. The ranks choose a step together (see `callbacks`), save a
checkpoint, and exit with status 75, which means: run the same command again. A second signal ends the rank at once.
Ctrl-C under a bare `deepspeed` sends two that are one wish: SIGINT of the terminal, then SIGTERM of the launcher, which
comes to a rank when those before it have ended.
"""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of <sysexits.h>
STOP_FILE = "STOP"
PASSED_ON = "a signal to the command"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_BETWEEN_FILE_CHECKS = 1.0
SECONDS_TO_ASK_AGAIN = 0.1


class _StopRequest:
    """What this process has been asked so far."""

    signal_number: int | None = None
    by_file = False
    can_save = False  # a step has begun: from now on there is something to save
    is_leaving = False  # saved or done: later signals change nothing
    file: Path | None = None
    file_checked_at = 0.0
    wakeup: tuple[int, int] | None = None  # a pipe with the numbers of signals, written before Python handles them


_request = _StopRequest()


def install_signal_handlers() -> None:
    """Make the signals ask to stop instead of ending this process; call it from the main thread."""
    _request.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(_request.wakeup[1], warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _handle)


def was_interrupted() -> bool:
    """Return whether Ctrl-C came, also while the main thread is in compiled code and has not handled it; once."""
    try:
        return _request.wakeup is not None and signal.SIGINT in os.read(_request.wakeup[0], 64)
    except BlockingIOError:
        return False


def watch_stop_file(stop_file: Path | None) -> None:
    """From now on wait for the end of a step when asked to stop, and look for `stop_file`, too."""
    _request.can_save, _request.file = True, stop_file


def ignore_signals() -> None:
    """Ignore further signals: everything is saved."""
    _request.is_leaving = True


def stop_requested() -> bool:
    """Return whether this process was asked to stop."""
    if _request.signal_number is not None or _request.by_file:
        return True
    now = time.monotonic()
    if _request.file is not None and now - _request.file_checked_at >= SECONDS_BETWEEN_FILE_CHECKS:
        _request.file_checked_at = now
        _request.by_file = _request.file.exists()
    return _request.by_file


def stop_reason() -> str | None:
    """Return the signal and its rank, or the path of the file that asked; None if nothing has."""
    if _request.signal_number is not None:
        name = _name(_request.signal_number)
        return name if name == PASSED_ON else f"{name} on rank {os.environ.get('RANK', '0')}"
    return str(_request.file) if _request.by_file else None


def reset() -> None:
    """Forget all requests; for a process that trains more than once."""
    global _request
    if _request.wakeup is not None:
        signal.set_wakeup_fd(-1)
        for end in _request.wakeup:
            os.close(end)
    _request = _StopRequest()


def ignore_in_worker(_: int) -> None:
    """Make a DataLoader worker ignore the signals: it ends with its rank."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame: Any) -> None:
    previous, _request.signal_number = _request.signal_number, number
    if _request.is_leaving:
        return
    name = _name(number)
    if not _request.can_save:
        if _is_in_destructor(frame):  # Python prints and drops what is raised there: ask again behind it
            threading.Timer(SECONDS_TO_ASK_AGAIN, os.kill, (os.getpid(), number)).start()
            return
        _request.is_leaving = True
        _write(f"{name}: nothing was trained yet, nothing is saved")
        raise SystemExit(EXIT_STOPPED)
    if previous == signal.SIGINT and number == signal.SIGTERM:
        return
    if previous is not None:
        _write(f"{name}, the second signal: exiting at once, nothing is saved")
        os._exit(128 + number)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _write(f"{name}: saving at the end of this step, then exiting; send it again to exit at once")


def _name(number: int) -> str:
    """Return the name of a signal; the ranks of `finetune train` get SIGUSR1 for whatever signal it has got."""
    is_passed_on = number == signal.SIGUSR1 and "FINETUNE_LAUNCH_DIR" in os.environ
    return PASSED_ON if is_passed_on else signal.Signals(number).name


def _is_in_destructor(frame: Any) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def _write(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # the signal may have interrupted a print, which is not reentrant
