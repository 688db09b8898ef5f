"""A rank's side of its watchdog: start it, report phases, failures and the end."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from finetune.diagnostics import Failure
from finetune.distributed import stop_requests
from finetune.distributed.launcher_processes import PARENT, die_with_launcher, launcher_pid, world_info
from finetune.distributed.watchdog.transport import PRINT_STACKS
from finetune.utils.errors import FinetuneError
from finetune.utils.proc import state_of

SECONDS_STOPPED = 20  # the others miss its heartbeat after 30
PYYAML = Path(yaml.__file__).parent.parent
_watchdog: subprocess.Popen[bytes] | None = None
_progress: dict[str, Any] = {"phase": "start", "step": None}


@contextmanager
def start_watchdog() -> Iterator[None]:
    """Watch this process until the block ends, and let it end with its launcher; failures inside are reported.

    Only three ends are good: the end of the block, status 75, and status 0 before the rendezvous (`--help`).
    """
    global _watchdog
    die_with_launcher(lambda process: _report_failure("launcher", f"{process} has died, and its ranks with it"))
    _watchdog = _start()
    former_handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may install handlers
        former_handlers = {number: signal.getsignal(number) for number in stop_requests.SIGNALS}
        stop_requests.install_signal_handlers()
    faulthandler.enable()  # a crash in compiled code leaves its stack
    faulthandler.register(PRINT_STACKS, all_threads=True, chain=False)
    try:
        yield
    except FinetuneError as error:
        _report_failure("error", str(error), status=error.status)
        raise
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if status == stop_requests.EXIT_STOPPED or (status == 0 and _progress["phase"] == "start"):
            _report_exit(status)
        else:
            _report_failure("exception", f"ended by itself with status {status}", status=status or 1)
        raise
    except BaseException as error:
        _report_failure("exception", f"{type(error).__name__}: {error}", stack=traceback.format_exc())
        raise
    else:
        _report_exit(0)
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)
        stop_requests.reset()


@contextmanager
def released_watchdog() -> Iterator[None]:
    """Let a process live on after a failure inside the block: its watchdog ends instead of killing it."""
    try:
        yield
    finally:
        if _watchdog is not None and os.environ.get("WORLD_SIZE") == "1":
            _report_exit(1)


def report_phase(name: str, step: int | None = None) -> None:
    """Report that the rank enters a phase (start, data, rendezvous, model, step, evaluation, save or end) or a step."""
    _progress.update(phase=name, step=step)
    _send(_progress)


def set_timeouts(**seconds: float | None) -> None:
    """Set how long each phase may take, see `coordinator.PhaseTimeouts`; 0: no limit."""
    _send({"timeouts": {name: value if value is None else max(value, 0) for name, value in seconds.items()}})


def set_output_dir(output_dir: Path, run_id: str) -> None:
    """Set where the record of a failure is written."""
    _send({"run": {"output_dir": str(output_dir.absolute()), "run_id": run_id}})


def _start() -> subprocess.Popen[bytes]:
    environment = os.environ
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), environment.get("MASTER_PORT", "0")
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    order = {
        "rank": int(environment["RANK"]),
        "local_rank": int(environment.get("LOCAL_RANK", "0")),
        "world_size": int(environment["WORLD_SIZE"]),
        "address": address,
        "port": port,
        "key": environment.get("FINETUNE_LAUNCH_KEY") or [address, port, words],
        "hosts": [host for host, slots in world_info().items() for _ in slots],
        "pid": os.getpid(),
        "launcher": launcher_pid(),
        "launch_dir": environment.get("FINETUNE_LAUNCH_DIR"),
        "supervisor": int(environment.get(PARENT, "0:").partition(":")[0]),
    }
    command = [sys.executable, "-S", "-I", str(Path(__file__).with_name("watchdog_process.py")), str(PYYAML)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    threading.Thread(target=_end_if_stopped, args=(process,), daemon=True, name="watchdog's state").start()
    return process


def _end_if_stopped(process: subprocess.Popen[bytes]) -> None:
    """End this rank when its watchdog has been stopped for some seconds (SIGSTOP): nothing else would end it."""
    seconds = 0
    while process.returncode is None and seconds < SECONDS_STOPPED:  # counted: this process may have been stopped, too
        time.sleep(1)
        seconds = seconds + 1 if state_of(process.pid) == "T" else 0
    if process.returncode is None:
        process.kill()  # its connection ends, so that the other watchdogs know at once
        _print_error(f"the watchdog of rank {os.environ['RANK']} (process {process.pid}) is stopped: the rank ends")
        os._exit(1)


def _send(message: dict[str, Any]) -> None:
    if _watchdog is None or _watchdog.stdin is None:
        return
    try:
        _watchdog.stdin.write(json.dumps(message).encode() + b"\n")
    except OSError:
        if "failure" in message or "exit" in message:  # the rank ends anyway, with a status of its own
            return
        _print_error(f"the watchdog of rank {os.environ['RANK']} has died: the rank ends")
        os._exit(1)


def _report_failure(kind: str, error: str, *, status: int = 1, stack: str = "") -> None:
    failure = Failure(
        kind=kind, error=error, status=status, traceback=stack,
        rank=None if kind == "launcher" else int(os.environ["RANK"]), host=os.uname().nodename, **_progress,
    )  # fmt: skip
    _send({"failure": failure.to_json()})


def _report_exit(status: int) -> None:
    global _watchdog
    _send({"exit": status})
    if _watchdog is not None and _watchdog.stdin is not None:
        _watchdog.stdin.close()
        _watchdog.returncode = 0  # it ends by itself, later than this process
        _watchdog = None


def _print_error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
