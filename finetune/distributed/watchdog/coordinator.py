"""What the watchdog of rank 0 knows of all ranks, and how it decides that the run has failed."""

import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from finetune.diagnostics import PHASES, Failure, find_first_failure, is_secondary, summarize_failure
from finetune.diagnostics.failure_page import where_in_run
from finetune.distributed.watchdog.transport import Connection, candidate_ports, listen

HEARTBEAT_TIMEOUT = 30.0  # seconds after which a host counts as lost
SECONDS_SILENT = 5.0  # after which what a rank has last said of its progress is not believed
SECONDS_TO_SETTLE = 1.0  # between the first report of a failure and the choice of the first failure
SECONDS_TO_SAY_WHY = 3.0  # between the end of a connection and the loss of its host
MIN_STEP_TIMEOUT, STEP_TIMEOUT_IN_MEDIANS = 300.0, 10.0
MAX_NAMED_RANKS = 8


@dataclass
class RankProgress:
    """Where a rank is: its phase, its step (-1 before the first), since when, and the state of its process."""

    phase: str = "start"
    step: int = -1
    since: float = field(default_factory=time.monotonic)
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    state: str = "?"

    def move(self, phase: str, step: int | None) -> None:
        """Enter a phase or a step."""
        now = time.monotonic()
        if self.phase == "step" and phase in ("step", "evaluation", "save", "end"):
            self.step_seconds.append(now - self.since)
        self.phase, self.step, self.since = phase, self.step if step is None else step, now

    @property
    def order(self) -> tuple[int, int]:
        """A key that compares ranks: the smallest is behind the others."""
        number = PHASES.index(self.phase) if self.phase in PHASES else 0
        return (0, number) if number < PHASES.index("step") else (self.step + 1, number)

    def seconds(self) -> float:
        """Return the seconds since the last progress."""
        return time.monotonic() - self.since


@dataclass
class PhaseTimeouts:
    """Seconds that a rank may stay in a phase; 0: no limit; None for a step: a multiple of the median step."""

    rendezvous: float | None = 60.0
    start: float | None = 1800.0
    step: float | None = None
    save: float | None = 1800.0

    def of(self, progress: RankProgress) -> float | None:
        """Return the timeout of the phase in which a rank is; None: no limit."""
        if progress.phase == "data":
            return None  # large data takes hours to prepare
        if progress.phase == "step":
            if self.step is not None:
                return self.step or None
            if progress.step_seconds:
                return max(MIN_STEP_TIMEOUT, STEP_TIMEOUT_IN_MEDIANS * statistics.median(progress.step_seconds))
        return (self.save if progress.phase in ("evaluation", "save", "end") else self.start) or None


@dataclass
class Peer:
    """A rank as the coordinator knows it; `connection` is None for rank 0 itself."""

    rank: int
    host: str
    connection: Connection | None
    progress: RankProgress = field(default_factory=RankProgress)
    last_heard: float = field(default_factory=time.monotonic)
    timeout: float | None = None
    exit_status: int | None = None  # of a rank that has ended as it should
    closed_at: float | None = None
    stopped_at: float | None = None  # since when its process is stopped (SIGSTOP, or a debugger)

    def is_connected(self) -> bool:
        """Return whether messages can still come."""
        return self.connection is not None and self.connection.is_open

    def time_in_phase(self, start_timeout: float | None) -> tuple[float, float | None]:
        """Return the seconds without progress, and the timeout of the phase."""
        if self.progress.phase == "start":  # it has not read its flags yet, others have
            return self.progress.seconds(), start_timeout
        if self.progress.phase == "data" and self.stopped_at is not None:  # a phase without a timeout, but stopped
            return time.monotonic() - self.stopped_at, start_timeout
        return self.progress.seconds(), self.timeout

    def failure(self, kind: str, error: str, ranks: Sequence[int]) -> Failure:
        """Return a failure of this rank at its present phase."""
        progress = self.progress
        return Failure(
            kind=kind, rank=self.rank, host=self.host, ranks=tuple(ranks), error=error, phase=progress.phase,
            step=progress.step if progress.step >= 0 else None, seconds=round(progress.seconds(), 1),
            hints=("State: T (stopped)",) if progress.state == "T" else (),
        )  # fmt: skip


class Coordinator:
    """All ranks of the run, whose `hosts` may be unknown, and the first failure; all watchdogs know the `key`."""

    def __init__(self, *, world_size: int, hosts: list[str], address: str, port: str, key: str) -> None:
        self.world_size, self.hosts, self.key = world_size, hosts, key
        self.started = time.monotonic()
        self.peers: dict[int, Peer] = {}
        self.pending: list[Connection] = []  # connections that have not shown the key yet
        self.reports: list[Failure] = []
        self.first_report_at: float | None = None
        self.first_failure: Failure | None = None
        self.server: socket.socket | None = None
        if world_size > 1:
            self.server = listen(address, candidate_ports(address, port))
            if self.server is None:
                self.report(Failure(kind="launcher", error="no port is free for the watchdogs of the ranks"))

    def readable(self) -> list[Any]:
        """Return all sockets and connections on which something may arrive."""
        connections = [peer.connection for peer in self.peers.values() if peer.is_connected()]
        return [*connections, *self.pending, *([self.server] if self.server else [])]

    def receive(self) -> None:
        """Handle all messages that have arrived."""
        with suppress(OSError):  # nobody connects now
            while self.server is not None:
                self.pending.append(Connection(self.server.accept()[0]))
        for connection in list(self.pending):
            for message in connection.receive()[:1]:  # a watchdog sends no more before the answer
                self._admit(connection, message)
            if not connection.is_open and connection in self.pending:
                self.pending.remove(connection)
        for peer in list(self.peers.values()):
            for message in peer.connection.receive() if peer.connection and peer.is_connected() else ():
                self.handle(peer, message)

    def _admit(self, connection: Connection, message: dict[str, Any]) -> None:
        """Make a connection that shows the key and a free rank a peer, close any other."""
        self.pending.remove(connection)
        hello = message.get("hello")
        hello = hello if isinstance(hello, dict) and hello.get("key") == self.key else {}
        rank = hello.get("rank")
        if rank is None or rank in self.peers or not 0 < rank < self.world_size:
            connection.close()
            return
        self.peers[rank] = Peer(rank, str(hello.get("host")), connection)
        connection.send({"welcome": self.key})
        if len(self.peers) == self.world_size:
            self.stop_accepting()

    def stop_accepting(self) -> None:
        """Close the port."""
        if self.server is not None:
            with suppress(OSError):
                self.server.shutdown(socket.SHUT_RDWR)
            self.server.close()
            self.server = None

    def handle(self, peer: Peer, message: dict[str, Any]) -> None:
        """Handle one message of a rank's watchdog."""
        peer.last_heard = time.monotonic()
        if "heartbeat" in message:
            heartbeat, progress = message["heartbeat"], peer.progress
            peer.timeout = heartbeat["timeout"]
            progress.phase, progress.step, progress.state = (heartbeat[name] for name in ("phase", "step", "state"))
            progress.since = time.monotonic() - heartbeat["seconds"]
        if "failure" in message:
            self.report(Failure.from_json(message["failure"]))
        if "exit" in message:
            peer.exit_status = message["exit"]

    def report(self, failure: Failure) -> None:
        """Record a failure with the time of its arrival: the clocks of hosts differ."""
        self.reports.append(replace(failure, when=datetime.now().astimezone().isoformat(timespec="milliseconds")))
        self.first_report_at = self.first_report_at or time.monotonic()

    def check(self, timeouts: PhaseTimeouts) -> None:
        """Look for lost, missing and stuck ranks; some time after the first report, choose the first failure."""
        now = time.monotonic()
        for peer in self.peers.values():
            peer.stopped_at = (peer.stopped_at or now) if peer.progress.state == "T" else None
            if peer.connection is not None:
                peer.connection.flush()
                if not peer.connection.is_open and peer.closed_at is None:
                    peer.closed_at = now
        if self.first_failure is not None:
            return
        if self.first_report_at is None:
            self._find_lost(now)
            self._find_missing(now, timeouts)
            self._find_stuck(timeouts)
        if self.first_report_at is not None and now - self.first_report_at >= SECONDS_TO_SETTLE:
            first = find_first_failure(self.reports)
            reporting = {report.rank for report in self.reports}
            silent = (peer for peer in self.peers.values() if peer.exit_status is None and peer.rank not in reporting)
            vanished = next((peer for peer in silent if peer.closed_at is not None), None)
            if is_secondary(first) and vanished is not None:  # what the others only noticed
                first = self._report_lost(vanished, "its connection ended")
            others = [summarize_failure(report) for report in self.reports if report.error != first.error]
            self.first_failure = replace(first, also=(*first.also, *others))
            self.stop_accepting()
            self.send_all({"end": self.first_failure.to_json()})

    def send_all(self, message: dict[str, Any]) -> None:
        """Send a message to all peers that are connected."""
        for peer in self.peers.values():
            if peer.connection is not None and peer.is_connected():
                peer.connection.send(message)

    def postpone(self, seconds: float) -> None:
        """Move all clocks: this process itself did not run for so long, which is no rank's fault."""
        self.started += seconds
        for peer in self.peers.values():
            peer.last_heard += seconds
            peer.progress.since += seconds
            peer.stopped_at = peer.stopped_at and peer.stopped_at + seconds

    def is_alone(self) -> bool:
        """Return whether all other watchdogs have left, or are lost."""
        oldest = time.monotonic() - HEARTBEAT_TIMEOUT
        return not any(peer.is_connected() and peer.last_heard > oldest for peer in self.peers.values())

    def _find_lost(self, now: float) -> None:
        for peer in self.peers.values():
            if peer.exit_status is not None or peer.connection is None:
                continue
            if peer.closed_at is not None and now - peer.closed_at > SECONDS_TO_SAY_WHY:
                self._report_lost(peer, "its connection ended")
                return
            if now - peer.last_heard > HEARTBEAT_TIMEOUT:
                self._report_lost(peer, f"no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s")
                return

    def _report_lost(self, peer: Peer, reason: str) -> Failure:
        ranks = [other.rank for other in self.peers.values() if other.host == peer.host]
        error = f"the watchdog of rank {peer.rank} on {peer.host} is gone: {reason}"
        self.report(peer.failure("lost", error, ranks))
        return self.reports[-1]

    def _find_missing(self, now: float, timeouts: PhaseTimeouts) -> None:
        timeout = timeouts.rendezvous
        if self.server is None or not timeout or now - self.started < timeout:
            return
        ranks = [rank for rank in range(self.world_size) if rank not in self.peers]
        hosts = sorted({self.hosts[rank] for rank in ranks if rank < len(self.hosts)})
        names = f" of {', '.join(hosts)}" if hosts else ""
        error = f"{len(ranks)} of {self.world_size} ranks{names} have not arrived within {timeout:.0f} s"
        self.report(Failure("missing", error, ranks=tuple(ranks), hosts=tuple(hosts), phase="rendezvous"))

    def _find_stuck(self, timeouts: PhaseTimeouts) -> None:
        """Report ranks that are behind all others for longer than their timeout; a stopped process is named first."""
        running = [peer for peer in self.peers.values() if peer.exit_status is None]
        if not running or len(self.peers) < self.world_size:
            return
        if any(time.monotonic() - peer.last_heard > SECONDS_SILENT for peer in running):
            return  # nobody knows how far it is; if it stays silent, it is lost
        last = min(peer.progress.order for peer in running)
        behind = [peer for peer in running if peer.progress.order == last]
        start_timeout = min(filter(None, (timeouts.start, *(peer.timeout for peer in running))), default=None)
        times = ((peer, *peer.time_in_phase(start_timeout)) for peer in behind)
        late = next(((peer, seconds, limit) for peer, seconds, limit in times if limit and seconds > limit), None)
        if late is None:
            return
        stopped = [peer for peer in behind if peer.progress.state == "T"]
        culprits = stopped or (behind if len(behind) < len(running) else [])
        named = culprits[0] if culprits else late[0]
        place = where_in_run(named.failure("stuck", "", ()))
        why = f"no progress for {late[1]:.0f} s {place} (limit {late[2]:.0f} s)"
        if stopped:
            error = f"rank {named.rank} on {named.host} is stopped (SIGSTOP, or a debugger): {why}"
        elif culprits:
            names = ", ".join(f"{peer.rank} on {peer.host}" for peer in culprits[:MAX_NAMED_RANKS])
            error = f"rank {names}: {why}; the other ranks have continued"
        else:
            error = f"{why} on all ranks: they wait for each other, or for a device or a disk"
        failure = named.failure("stuck", error, [peer.rank for peer in culprits or running])
        self.report(failure if culprits else replace(failure, rank=None, host=None))
