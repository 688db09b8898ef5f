"""The part of `finetune launch` on one host: the `deepspeed` command in a session of its own, watched to its end.

    finetune launch ─┬─ LocalSession ── deepspeed ── launch.py ── ranks                  this host
                     └─ ssh node1 ── run_agent() ── LocalSession ── deepspeed ...        any other

All processes of the run belong to that session (setsid). They are found even if they were orphaned, and no other
process is ever signalled.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TextIO

from finetune.diagnostics import FAILURE_FILE, Failure, read_failure
from finetune.distributed.launcher_processes import DEEPSPEED, PARENT
from finetune.distributed.stop_requests import EXIT_STOPPED
from finetune.utils.proc import POLL_SECONDS, command_of, die_with_parent, parent_of, started_at, stat_of

SECONDS_TO_FINISH = 10.0  # for processes that outlive the command
SECONDS_TO_FORWARD = 5.0
REPORT_PREFIX = "\x1efinetune-report "
HOSTFILE_PLACEHOLDER = "--hostfile=(a copy of it)"


@dataclass(frozen=True)
class HostReport:
    """How the run on one host ended."""

    host: str
    status: int  # of the `deepspeed` command, as a shell gives it (128 + signal for a killed command)
    statuses: list[int] = field(default_factory=list)  # of the ranks that ended by themselves
    failure: Failure | None = None  # what the watchdogs found, if anything

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps({**asdict(self), "failure": self.failure and self.failure.to_json()})

    @classmethod
    def from_json(cls, line: str) -> HostReport:
        """Read what `to_json` wrote."""
        values = json.loads(line)
        return cls(**{**values, "failure": values["failure"] and Failure.from_json(values["failure"])})


class LocalSession:
    """The `deepspeed` command on this host, with all processes that it starts.

    `environment` is never part of a command line. A copy of the text `hostfile` takes the place of
    `HOSTFILE_PLACEHOLDER`. With `prefix_lines`, each line of output begins with the host's name.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        hostfile: str | None,
        host: str,
        prefix_lines: bool = False,
    ) -> None:
        self.host = host
        self.folder = Path(tempfile.mkdtemp(prefix="finetune-launch-"))
        command = list(command)
        if hostfile is not None:
            copy = self.folder / "hostfile"
            copy.write_text(hostfile, encoding="utf-8")
            # The first such word is ours: it stands before the script.
            command[command.index(HOSTFILE_PLACEHOLDER)] = f"--hostfile={copy}"
        self.was_asked_to_stop = False
        own = {"FINETUNE_LAUNCH_DIR": str(self.folder), PARENT: f"{os.getpid()}:{started_at(os.getpid())}"}
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if prefix_lines else None,
            stderr=subprocess.PIPE if prefix_lines else None,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        self.forwarders = forward_output(host, self.process)

    def is_running(self) -> bool:
        """Return whether the command still runs."""
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Ask the ranks to save and exit; if there are none yet, nothing needs saving: end the command."""
        self.was_asked_to_stop = True
        ranks = [pid for pid in self._pids() if DEEPSPEED in command_of(parent_of(pid) or 0)]
        self._signal(ranks, signal.SIGUSR1)
        if not ranks and not any(self.folder.glob("rank-*.json")):
            self.kill()

    def kill(self) -> None:
        """End every process of the run on this host."""
        self._signal(self._pids(), signal.SIGKILL)

    disconnect = kill  # there is no connection to close

    def finish(self) -> HostReport:
        """After the command has ended, give its processes some seconds, kill what is left, and report."""
        deadline = time.monotonic() + SECONDS_TO_FINISH
        while (pids := self._pids()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
        self._signal(pids, signal.SIGKILL)
        code = self.process.wait()
        for forwarder in self.forwarders:
            forwarder.join(SECONDS_TO_FORWARD)
        status = 128 - code if code < 0 else code if code <= 192 else 384 - code  # launch.py's -N arrives as 256 - N
        statuses = [json.loads(path.read_text())["status"] for path in self.folder.glob("rank-*.json")]
        failure = read_failure(self.folder / FAILURE_FILE)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.was_asked_to_stop and failure is None and (not statuses or status == 128 + signal.SIGUSR1):
            status = EXIT_STOPPED  # before any rank had begun, or before each could handle the signal
        return HostReport(self.host, status, statuses, failure)

    def _pids(self) -> list[int]:
        """The living processes of the session, whatever their parents are."""
        pids = []
        for entry in os.listdir("/proc"):
            fields = stat_of(int(entry)) if entry.isdigit() else None
            if fields and fields[3] == str(self.process.pid) and fields[0] != "Z":
                pids.append(int(entry))
        return pids

    @staticmethod
    def _signal(pids: Iterable[int], number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


_printing = threading.Lock()


def forward_output(
    host: str, process: subprocess.Popen[bytes], take: Callable[[str], bool] = lambda _: False
) -> list[threading.Thread]:
    """Start threads that print each line of a process's pipes, with the host's name, unless `take` handles it."""

    def forward(source: IO[bytes], target: TextIO) -> None:
        for raw in source:
            line = raw.decode(target.encoding or "utf-8", errors="replace").rstrip("\n")
            if take(line):
                continue
            with _printing, suppress(OSError, ValueError):  # a terminal that is gone must not stop the run
                target.write(f"{host}: {line}\n")
                target.flush()

    streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    threads = [threading.Thread(target=forward, args=pair, daemon=True) for pair in streams if pair[0] is not None]
    for thread in threads:
        thread.start()
    return threads


def run_agent() -> None:
    """Run a session on another host: read the order from stdin, then `stop` or `end`; the end of stdin ends the run.

    The order is one line of JSON, with the arguments of `LocalSession` and a folder to work in. In this way nothing
    secret is on a command line. The last line on stderr is the `HostReport`.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which would be inherited
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # without a buffer, in which later words would stay
        order = json.loads(stdin.readline())
    os.chdir(order.pop("folder"))
    session = LocalSession(**order)
    while session.is_running():
        if select.select([0], [], [], POLL_SECONDS)[0]:
            words = os.read(0, 1 << 12)
            if b"stop" in words:
                session.ask_to_stop()
            if not words or b"end" in words:  # without words, `finetune launch` or the connection is gone
                session.kill()
                break
    report = session.finish()
    with suppress(OSError):
        print(REPORT_PREFIX + report.to_json(), file=sys.stderr, flush=True)
