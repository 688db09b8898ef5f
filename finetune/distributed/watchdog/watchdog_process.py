"""The watchdog of one rank: a small process beside it, with the standard library and PyYAML alone.

A thread of the rank would stop with it and block with it: on a lock, on a device, in a library that does not release
the interpreter. This process sees at once that its rank dies (pidfd), has its own clock and connections, and can end
the rank whatever the rank is doing.

    rank --(lines on stdin: phases, failures, exit)--> its watchdog <--(TCP)--> the watchdog of rank 0
    rank <--(signals: print your stacks, die)--------- its watchdog
"""

import hashlib
import json
import os
import re
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file, so that nothing else is imported
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    sys.path += sys.argv[1:]  # where PyYAML is, which the table of known causes needs

from finetune.diagnostics import (
    FAILURE_FILE,
    Failure,
    format_failure_page,
    is_secondary,
    load_known_causes,
    write_failure,
)
from finetune.distributed.watchdog.coordinator import HEARTBEAT_TIMEOUT, Coordinator, Peer, PhaseTimeouts, RankProgress
from finetune.distributed.watchdog.transport import PRINT_STACKS, Connection, candidate_ports
from finetune.utils.proc import parent_of, receive_at_parents_end, stat_of, state_of

POLL_MILLISECONDS, HEARTBEAT_SECONDS = 250, 1.0
SECONDS_TO_FAIL = 12.0  # for a rank that prints its own error
SECONDS_FOR_STACKS = 1.5
SECONDS_AFTER_A_DEATH = 0.5
SECONDS_FOR_OTHERS = 8.0
SECONDS_WITHOUT_COORDINATOR = 3.0
EXTRA_SECONDS_TO_CONNECT = 15.0
SUSPENDED_SECONDS = 5.0


class Watchdog:
    """The watchdog of one rank; that of rank 0 has the coordinator, all others a connection to it."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.unread: bytes | None = b""  # the beginning of a line from stdin; None at its end
        self.rank, self.host, self.pid = order["rank"], os.uname().nodename, order["pid"]
        self.pidfd = os.pidfd_open(self.pid)
        self.key = hashlib.sha256(json.dumps(order["key"]).encode()).hexdigest()
        self.timeouts, self.progress = PhaseTimeouts(), RankProgress()
        self.started = self.last_poll = self.last_heard = time.monotonic()
        self.last_heartbeat = 0.0
        self.run: dict[str, Any] = {}
        self.exit_status: int | None = None
        self.has_reported = False  # the rank a failure
        self.gone_at: float | None = None
        self.kill_at: float | None = None
        self.failure: Failure | None = None  # the first failure of the run
        self.oom_kills = _count_oom_kills()
        self.coordinator: Coordinator | None = None
        self.connection: Connection | None = None
        if self.rank == 0:
            self.coordinator = Coordinator(
                world_size=order["world_size"], hosts=order["hosts"], address=order["address"], port=order["port"],
                key=self.key,
            )  # fmt: skip
            self.coordinator.peers[0] = Peer(0, self.host, None, progress=self.progress)

    def watch(self) -> None:
        """Watch until the rank is gone and everything is reported."""
        while not self._is_done():
            self._poll()
            self._skip_suspension()
            self._read_rank()
            if self.coordinator:
                own = self.coordinator.peers[0]
                own.last_heard, own.exit_status = time.monotonic(), self.exit_status
                own.timeout, own.progress.state = self.timeouts.of(self.progress), state_of(self.pid)
                self.coordinator.receive()
                self.coordinator.check(self.timeouts)
                self._end_run(self.coordinator.first_failure)
            else:
                self._read_coordinator()
            self._send_heartbeat()
            if self.kill_at is not None and self.gone_at is None and time.monotonic() >= self.kill_at:
                with suppress(OSError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._print_page()

    def _poll(self) -> None:
        poll = select.poll()
        if self.gone_at is None:
            poll.register(self.pidfd, select.POLLIN)
        if self.unread is not None:
            poll.register(0, select.POLLIN)
        own = [self.connection] if self.connection and self.connection.is_open else []
        for readable in self.coordinator.readable() if self.coordinator else own:
            poll.register(readable.fileno(), select.POLLIN)
        poll.poll(POLL_MILLISECONDS)

    def _skip_suspension(self) -> None:
        """Move all clocks after a pause: Ctrl-Z in a terminal, or a machine that slept, is no rank's fault."""
        now = time.monotonic()
        pause, self.last_poll = now - self.last_poll, now
        if pause > SUSPENDED_SECONDS:
            self.last_heard += pause
            self.started += pause
            if self.coordinator:
                self.coordinator.postpone(pause)  # its peer 0 shares `progress`
            else:
                self.progress.since += pause

    def _read_rank(self) -> None:
        is_gone = self.gone_at is None and bool(select.select([self.pidfd], [], [], 0)[0])
        while self.unread is not None and select.select([0], [], [], 0)[0]:
            chunk = os.read(0, 1 << 16)
            *lines, rest = (self.unread + chunk).split(b"\n")
            self.unread = rest if chunk else None
            for line in lines:
                self._handle(json.loads(line))
        if is_gone:
            self.gone_at = time.monotonic()
            if self.exit_status is None and not self.has_reported:
                self._send({"failure": self._describe_death().to_json()})

    def _handle(self, message: dict[str, Any]) -> None:
        if "phase" in message:
            if message["phase"] != self.progress.phase:
                self.last_heartbeat = 0.0  # the coordinator knows it at once, should this host be lost
            self.progress.move(message["phase"], message.get("step"))
        if "timeouts" in message:
            self.timeouts = PhaseTimeouts(**message["timeouts"])
        if "run" in message:
            self.run = message["run"]
        if "failure" in message:
            self.has_reported = True
            self._send({"failure": message["failure"]})
        if "exit" in message:
            self.exit_status = message["exit"]
            self._write_for_launch({"status": self.exit_status}, f"rank-{self.rank}.json")
            self._send({"exit": self.exit_status})

    def _send(self, message: dict[str, Any]) -> None:
        """Send a message to the coordinator; without one, a failure of this rank is the first failure."""
        if self.coordinator:
            self.coordinator.handle(self.coordinator.peers[0], message)
        elif self.connection and self.connection.is_open:
            self.connection.send(message)
        elif "failure" in message:
            failure = Failure.from_json(message["failure"])
            self._end_run(self._loss_of_coordinator() if self.connection and is_secondary(failure) else failure)

    def _describe_death(self) -> Failure:
        """What is known of a rank that ended without a message."""
        launcher = self.order["launcher"]
        if launcher and parent_of(launcher) is None:
            error = f"deepspeed.launcher.launch (process {launcher}) has died, and its ranks with it"
            return self._failure("launcher", error, rank=None)
        number = status = None
        fields = stat_of(self.pid)
        if fields and fields[0] == "Z":  # its parent has not waited for it yet: field 52 is the exit code, see proc(5)
            code = int(fields[49])
            number, status = (code & 0x7F, None) if code & 0x7F else (None, code >> 8)
        how = f"signal {number}" if number else "killed, or crashed" if status is None else f"status {status}"
        kills = _count_oom_kills()
        return self._failure(
            "died",
            f"rank {self.rank} on {self.host} ended without a message: {how}",
            hints=(f"oom_kill {self.oom_kills} -> {kills}",) if kills > self.oom_kills else (),
            signal=number,
            status=128 + number if number else status or 1,
        )

    def _failure(self, kind: str, error: str, **fields: Any) -> Failure:
        step = self.progress.step if self.progress.step >= 0 else None
        fields = {"rank": self.rank, "host": self.host, "phase": self.progress.phase, **fields}
        return Failure(kind=kind, error=error, step=step, **fields)

    def _send_heartbeat(self) -> None:
        now = time.monotonic()
        if now - self.last_heartbeat < HEARTBEAT_SECONDS:
            return
        self.last_heartbeat = now
        if self.coordinator:
            self.coordinator.send_all({"alive": True})
        elif self.connection and self.connection.is_open:
            progress = self.progress
            values = {"phase": progress.phase, "step": progress.step, "seconds": progress.seconds()}
            values |= {"timeout": self.timeouts.of(progress), "state": state_of(self.pid)}
            self.connection.send({"heartbeat": values})

    def _read_coordinator(self) -> None:
        if self.connection is None:
            self._join()
            return
        now = time.monotonic()
        for message in self.connection.receive() if self.connection.is_open else ():
            self.last_heard = now
            if "end" in message:
                self._end_run(Failure.from_json(message["end"]))
        silence = now - self.last_heard
        is_lost = not self.connection.is_open and silence > SECONDS_WITHOUT_COORDINATOR
        if self.exit_status is None and (is_lost or silence > HEARTBEAT_TIMEOUT):
            self._end_run(self._loss_of_coordinator())

    def _join(self) -> None:
        """Try to connect to the coordinator, until it is missing."""
        began = time.monotonic()
        if self.gone_at is None and self.failure is None:
            self._connect()
            self.last_poll = time.monotonic()  # waiting for an answer is no suspension
        timeout = self.timeouts.rendezvous
        if self.connection is None and timeout and began - self.started > timeout + EXTRA_SECONDS_TO_CONNECT:
            seconds = timeout + EXTRA_SECONDS_TO_CONNECT
            error = f"rank 0 at {self.order['address']} was not reached within {seconds:.0f} s"
            hosts = tuple(self.order["hosts"][:1])
            self._end_run(self._failure("missing", error, rank=None, ranks=(0,), hosts=hosts, phase="rendezvous"))

    def _connect(self) -> None:
        for port in candidate_ports(self.order["address"], self.order["port"]):
            try:
                connection = socket.create_connection((self.order["address"], port), timeout=1.0)
            except TimeoutError:  # packets are dropped, on all ports
                return
            except OSError:
                continue
            with suppress(OSError, ValueError):
                hello = {"key": self.key, "rank": self.rank, "host": self.host}
                connection.sendall(json.dumps({"hello": hello}).encode() + b"\n")
                connection.settimeout(2.0)
                answer = connection.makefile("rb").readline()
                if json.loads(answer).get("welcome") == self.key:
                    self.connection, self.last_heard = Connection(connection), time.monotonic()
                    return
            connection.close()

    def _loss_of_coordinator(self) -> Failure:
        error = f"the watchdog of rank 0 at {self.order['address']} is gone"
        return self._failure("lost", error, rank=0, host=(self.order["hosts"] or [None])[0], ranks=(0,))

    def _end_run(self, failure: Failure | None) -> None:
        """If the run has failed, set the time at which the rank is killed, and write the record."""
        if failure is None or self.failure is not None:
            return
        newest = _newest_checkpoint(self.run.get("output_dir"))
        failure = self.failure = replace(failure, run=self.run.get("run_id", ""), checkpoint=newest)
        self._write_for_launch(failure.to_json(), FAILURE_FILE)
        if self.run and (self.rank == 0 or (failure.kind == "lost" and self.order["local_rank"] == 0)):
            write_failure(Path(self.run["output_dir"]), failure)
        if failure.kind in ("stuck", "missing", "lost"):
            seconds = SECONDS_FOR_STACKS
            if self.gone_at is None and self.progress.phase != "start":
                print(f"stacks of rank {self.rank} on {self.host} (process {self.pid}):", file=sys.stderr, flush=True)
                with suppress(OSError):
                    signal.pidfd_send_signal(self.pidfd, PRINT_STACKS)
        else:
            seconds = SECONDS_TO_FAIL if self.has_reported or failure.kind == "error" else SECONDS_AFTER_A_DEATH
        self.kill_at = time.monotonic() + seconds

    def _is_done(self) -> bool:
        if self.gone_at is None:  # a run of one process that has told its end needs no watchdog, though it may live on
            return self.exit_status is not None and self.unread is None and self.order["world_size"] == 1
        waited = time.monotonic() - self.gone_at
        if self.coordinator:
            has_ended_well = self.exit_status is not None and self.coordinator.first_report_at is None
            is_reported = self.failure is not None or has_ended_well
            return (is_reported and self.coordinator.is_alone()) or waited > SECONDS_FOR_OTHERS + SECONDS_TO_FAIL
        return self.exit_status is not None or self.failure is not None or waited > SECONDS_FOR_OTHERS

    def _print_page(self) -> None:
        """Print the failure page, unless a `finetune launch` on this host prints it."""
        failure, supervisor = self.failure, self.order.get("supervisor")
        if failure is None or (supervisor and state_of(supervisor) not in "?Z"):
            return
        speaks_for_host = self.order["local_rank"] == 0 and (failure.kind == "lost" or self.connection is None)
        if (self.rank == 0 or speaks_for_host) and not failure.is_said():
            record = str(Path(self.run["output_dir"], FAILURE_FILE)) if self.run else ""
            page = format_failure_page(failure, colour=sys.stderr.isatty(), record=record)
            print(f"\n{page}", file=sys.stderr, flush=True)

    def _write_for_launch(self, value: dict[str, Any], name: str) -> None:
        """Write a file for the `finetune launch` of this host."""
        folder = self.order.get("launch_dir")
        if not folder:
            return
        path = Path(folder, name)
        with suppress(OSError):  # that command is gone, and its folder with it
            scratch = path.with_suffix(f".{self.rank}")
            scratch.write_text(json.dumps(value), encoding="utf-8")
            scratch.replace(path)


def _newest_checkpoint(output_dir: str | None) -> str:
    """The newest complete checkpoint, "" if there is none; a renamed one (`checkpoint-8.later-...`) does not count."""
    complete = [path.parent for path in Path(output_dir).glob("checkpoint-*/manifest.json")] if output_dir else []
    steps = {int(match[1]): path for path in complete if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return str(steps[max(steps)]) if steps else ""


def _count_oom_kills() -> int:
    """How many processes of this machine the kernel has killed for lack of memory (/proc/vmstat, since Linux 4.13)."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def main() -> None:
    """Read the order of the rank from stdin, then watch the rank."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    receive_at_parents_end(signal.SIGCONT)  # if this process is stopped then, it would stay for ever
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # without a buffer, in which later lines would stay
        line = stdin.readline()
    if not line.endswith(b"\n"):  # the rank is gone already
        return
    load_known_causes()  # now, because the disk may not respond once they are needed
    with suppress(ProcessLookupError):  # the rank is gone already
        Watchdog(json.loads(line)).watch()


if __name__ == "__main__":
    main()
