"""A rank's side of its guard: start it, tell it where the rank is, say goodbye."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from finetune.diagnostics import Failure
from finetune.distributed import stop_requests
from finetune.distributed.watchdog import launcher_processes as above
from finetune.distributed.watchdog.transport import PRINT_STACKS
from finetune.utils.errors import FinetuneError

PYYAML = Path(yaml.__file__).parent.parent
_guard: subprocess.Popen | None = None
_launcher: int | None = None
_place: dict[str, Any] = {"phase": "start", "step": None}


@contextmanager
def start_watchdog() -> Iterator[None]:
    """Watch this process until the block is left, and let it end with its launcher; what goes wrong inside is told.

    A process ends well in three ways only: by the end of the block, with status 75, or with status 0 before it has
    joined the others (`--help`).
    """
    global _guard, _launcher
    _launcher = above.die_with_launcher(_end_with_launcher)
    _guard = _start()
    former = _listen()
    faulthandler.enable()  # a crash in compiled code leaves its stack
    if hasattr(faulthandler, "register"):
        faulthandler.register(PRINT_STACKS, all_threads=True, chain=False)
    try:
        yield
    except FinetuneError as error:
        _tell_failure("error", str(error), status=error.status)
        raise
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if status == stop_requests.EXIT_STOPPED or (status == 0 and _place["phase"] == "start"):
            _say_goodbye(status)
        else:
            _tell_failure("exception", f"ended by itself with status {status}", status=status or 1)
        raise
    except BaseException as error:
        _tell_failure("exception", f"{type(error).__name__}: {error}", traceback_text=traceback.format_exc())
        raise
    else:
        _say_goodbye(0)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        stop_requests.reset()


def report_phase(name: str, step: int | None = None) -> None:
    """The rank has come to here: start, data, rendezvous, model, step, evaluation, save or end."""
    _place.update(phase=name, step=step)
    _tell({"phase": name, "step": step})


def set_timeouts(**seconds: float | None) -> None:
    """How long each phase may take, see `hub.Limits`; 0 means for ever."""
    _tell({"limits": {name: value if value is None or value > 0 else 0 for name, value in seconds.items()}})


def set_output_dir(output_dir: Path, run_id: str) -> None:
    """Where a record of a failure goes."""
    _tell({"run": {"output_dir": str(output_dir.absolute()), "run_id": run_id}})


def launcher_pid() -> int | None:
    """The process that started this rank, None for a rank that no launcher has started."""
    return _launcher


def _start() -> subprocess.Popen | None:
    environment = os.environ
    world = above.world_info_of(_launcher)
    hosts = [host for host, slots in world.items() for _ in slots]
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), environment.get("MASTER_PORT", "0")
    order = {
        "rank": int(environment["RANK"]),
        "local_rank": int(environment.get("LOCAL_RANK", "0")),
        "world_size": int(environment["WORLD_SIZE"]),
        "address": address,
        "port": port,
        "key": environment.get("FINETUNE_LAUNCH_KEY") or [address, port, words],
        "hosts": hosts,
        "process": os.getpid(),
        "launcher": _launcher,
        "launch_dir": environment.get("FINETUNE_LAUNCH_DIR"),
        "supervisor": int(environment.get("FINETUNE_SUPERVISOR", "0")),
    }
    child = [sys.executable, "-S", "-I", str(Path(__file__).with_name("watchdog_process.py")), str(PYYAML)]
    guard = subprocess.Popen(child, stdin=subprocess.PIPE, bufsize=0)
    guard.stdin.write(json.dumps(order).encode() + b"\n")
    return guard


def _listen() -> dict[int, Any]:
    """Take over the signals that ask to stop; returns what was there. Only the main thread may."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        return {}
    former = {number: signal.getsignal(number) for number in stop_requests.SIGNALS}
    stop_requests.install_signal_handlers()
    return former


def _tell(message: dict[str, Any]) -> None:
    if _guard is None or _guard.stdin is None:
        return
    try:
        _guard.stdin.write(json.dumps(message).encode() + b"\n")
    except OSError:
        _leave_unguarded()


def _leave_unguarded() -> None:
    print(f"error: the guard of rank {os.environ['RANK']} has died: the rank ends", file=sys.stderr, flush=True)
    os._exit(1)


def _tell_failure(kind: str, error: str, *, status: int = 1, traceback_text: str = "") -> None:
    failure = Failure(
        kind=kind, error=error, status=status, traceback=traceback_text,
        rank=None if kind == "launcher" else int(os.environ["RANK"]), host=os.uname().nodename,
        phase=_place["phase"], step=_place["step"],
    )  # fmt: skip
    with suppress(OSError):
        if _guard is not None and _guard.stdin is not None:
            _guard.stdin.write(json.dumps({"failure": failure.to_json()}).encode() + b"\n")


def _say_goodbye(status: int) -> None:
    global _guard
    _tell({"bye": status})
    if _guard is not None:
        _guard.stdin.close()
        _guard.returncode = 0  # it leaves by itself, later than this process
        _guard = None


def _end_with_launcher(what: str) -> None:
    """What started this rank is gone."""
    _tell_failure("launcher", f"{what} has died, and its ranks with it")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {what} has died: the ranks of this host end", file=sys.stderr, flush=True)
    os._exit(1)
