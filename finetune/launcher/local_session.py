"""One host's part of `finetune launch`: the `deepspeed` command in a session of its own, watched to its end.

    finetune launch ─┬─ Session ── deepspeed ── launch.py ── ranks          this host
                     └─ ssh node1 ── agent() ── Session ── deepspeed ...     any other

What belongs to the run is its session (setsid): it is found whatever was orphaned, and nothing else is ever signalled.
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
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.diagnostics import FAILURE_FILE, Failure, read_failure
from finetune.distributed.stop_requests import EXIT_STOPPED
from finetune.distributed.watchdog.launcher_processes import DEEPSPEED
from finetune.utils.proc import POLL_SECONDS, command_of, die_with_parent, parent_of, stat_of

SECONDS_FOR_LAST_WORDS = 10.0
REPORT = "\x1efinetune-report "
HOSTFILE_HERE = "--hostfile=(a copy of it)"  # in front of the script, where the first such word is ours


@dataclass(frozen=True)
class HostReport:
    """How a host's part ended.

    Attributes:
        status: of the `deepspeed` command, as a shell would say it (128 + signal for a killed one).
        statuses: of the ranks that came to their own end, by rank.
        failure: what the guards found, if anything.
    """

    host: str
    status: int
    statuses: dict[int, int] = field(default_factory=dict)
    failure: Failure | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps({**asdict(self), "failure": self.failure.to_json() if self.failure else None})

    @classmethod
    def from_json(cls, line: str) -> HostReport:
        """What `to_json` wrote."""
        values = json.loads(line)
        failure = Failure.from_json(values["failure"]) if values["failure"] else None
        return cls(
            values["host"], values["status"], {int(rank): one for rank, one in values["statuses"].items()}, failure
        )


class LocalSession:
    """The `deepspeed` command on this host, with all that it starts.

    Args:
        environment: variables to set beside this process's own; they are never part of a command line.
        hostfile: its text where there is one: a copy is written here, and named where `command` has `HOSTFILE_HERE`.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, hostfile: str | None, host: str, **pipes: Any
    ) -> None:
        self.host = host
        self.folder = Path(tempfile.mkdtemp(prefix="finetune-launch-"))
        command = list(command)
        if hostfile is not None:
            copy = self.folder / "hostfile"
            copy.write_text(hostfile, encoding="utf-8")
            command[command.index(HOSTFILE_HERE)] = f"--hostfile={copy}"
        self.asked = False
        own = {"FINETUNE_LAUNCH_DIR": str(self.folder), "FINETUNE_SUPERVISOR": str(os.getpid())}
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **environment, **own},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
            **pipes,
        )

    def is_running(self) -> bool:
        """Whether the command still runs."""
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Tell the ranks to save and leave; where there are none yet, there is nothing to save."""
        self.asked = True
        ranks = [one for one in self._processes() if DEEPSPEED in command_of(parent_of(one) or 0)]
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR1)
        if not ranks:
            self.end_now()

    def end_now(self) -> None:
        """End every process of the run on this host."""
        for one in self._processes():
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)

    cut = end_now  # there is no connection to give up

    def conclude(self) -> HostReport:
        """Once the command has ended: give what is left a moment for its last words, end it, and say how it was."""
        deadline = time.monotonic() + SECONDS_FOR_LAST_WORDS
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
        if left:
            self.end_now()
        code = self.process.wait()
        status = 128 - code if code < 0 else code if code <= 192 else 384 - code  # launch.py's -N arrives as 256 - N
        statuses = {}
        for path in self.folder.glob("rank-*.json"):
            statuses[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text())["status"]
        failure = read_failure(self.folder / FAILURE_FILE)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.asked and failure is None and (not statuses or status == 128 + signal.SIGUSR1):
            status = EXIT_STOPPED  # before any rank had begun, or before each could hear
        return HostReport(self.host, status, statuses, failure)

    def _processes(self) -> list[int]:
        """The processes of the run that are alive, wherever their parents went."""
        found = []
        for entry in os.listdir("/proc"):
            fields = stat_of(int(entry)) if entry.isdigit() else None
            if fields and fields[3] == str(self.process.pid) and fields[0] != "Z":
                found.append(int(entry))
        return found


def agent() -> None:
    """What runs on another host: an order on standard input, then `stop` or `end`; its end ends the run here.

    The order is a line of JSON with the arguments of `Session` and a folder to work in. Everything that must not be
    seen on a command line comes this way. The last line on standard error is the `HostReport`.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN: that would be inherited
    order = json.loads(sys.stdin.buffer.raw.readline())
    os.chdir(order.pop("folder"))
    run = LocalSession(**order)
    while run.is_running():
        if select.select([0], [], [], POLL_SECONDS)[0]:
            words = os.read(0, 1 << 12)
            if b"stop" in words:
                run.ask_to_stop()
            if not words or b"end" in words:  # nothing: the launch, or the way to it, is gone
                run.end_now()
                break
    report = run.conclude()
    with suppress(OSError):
        print(REPORT + report.to_json(), file=sys.stderr, flush=True)
