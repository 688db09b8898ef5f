"""What the guard of rank 0 knows of all ranks, and when it calls the run failed."""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from finetune.diagnostics import PHASES, Failure, find_first_failure, is_secondary, summarize_failure
from finetune.distributed.watchdog.transport import Connection, candidate_ports, listen

SECONDS_OF_SILENCE = 30.0  # behind which a host counts as lost
SECONDS_TO_SETTLE = 1.0  # between the first sign of a failure and the choice of what came first
SECONDS_FOR_A_GOODBYE = 3.0  # between the end of a connection and calling its host lost
LEAST_STEP_LIMIT, STEP_LIMIT_IN_MEDIANS = 300.0, 10.0


@dataclass
class PhaseTimeouts:
    """Seconds that a rank may stay in a phase; 0: for ever; None for a step: by the median of earlier ones."""

    meeting: float | None = 60.0
    start: float | None = 1800.0
    step: float | None = None
    save: float | None = 1800.0

    def of(self, place: RankPhase) -> float | None:
        """The limit of where a rank is now."""
        if place.phase == "data":
            return None  # large data takes hours to prepare
        if place.phase == "step":
            if self.step is not None:
                return self.step or None
            if place.median is not None:
                return max(LEAST_STEP_LIMIT, STEP_LIMIT_IN_MEDIANS * place.median)
        return (self.save if place.phase in ("evaluation", "save", "end") else self.start) or None


@dataclass
class RankPhase:
    """Where a rank is: its phase, its step, since when."""

    phase: str = "start"
    step: int = -1
    since: float = field(default_factory=time.monotonic)
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    median: float | None = None
    state: str = "?"

    def move(self, phase: str, step: int | None) -> None:
        """The rank has gone on."""
        now = time.monotonic()
        if self.phase == "step" and phase in ("step", "evaluation", "save", "end"):
            self.durations.append(now - self.since)
            self.median = statistics.median(self.durations)
        self.phase, self.step, self.since = phase, self.step if step is None else step, now

    @property
    def order(self) -> tuple[int, int]:
        """What can be compared between ranks: who is behind."""
        number = PHASES.index(self.phase) if self.phase in PHASES else 0
        return (0, number) if number < PHASES.index("step") else (self.step + 1, number)

    def seconds(self) -> float:
        """Since the last sign of progress."""
        return time.monotonic() - self.since

    def words(self) -> str:
        """For a message."""
        names = {
            "start": "starting", "data": "preparing data", "rendezvous": "joining the others", "model": "loading",
            "step": f"in step {self.step}", "save": f"saving in step {self.step}",
            "evaluation": f"evaluating after step {self.step}",
        }  # fmt: skip
        return names.get(self.phase, "finishing")


@dataclass
class Peer:
    """A rank as the hub knows it. `wire` is None for rank 0 itself."""

    rank: int
    host: str
    wire: Connection | None
    place: RankPhase = field(default_factory=RankPhase)
    heard: float = field(default_factory=time.monotonic)
    limit: float | None = None
    bye: int | None = None
    closed_at: float | None = None


class Coordinator:
    """All ranks of the run, and the first failure among them."""

    def __init__(self, order: dict[str, Any], key: str) -> None:
        self.world_size, self.key = order["world_size"], key
        self.hosts: list[str] = order["hosts"]  # by rank, as the hostfile names them; may be empty
        self.started = time.monotonic()
        self.members: dict[int, Peer] = {}
        self.strangers: list[Connection] = []
        self.reported: list[Failure] = []
        self.first_sign: float | None = None
        self.verdict: Failure | None = None
        self.listening = None
        if self.world_size > 1:
            address = order["address"]
            self.listening = listen(address, candidate_ports(address, order["port"]))
            if self.listening is None:
                self.report(Failure(kind="launcher", error="no port is free on which the guards of the ranks can meet"))

    def wires(self) -> list[Any]:
        """All that may have something to read."""
        connected = [member.wire for member in self.members.values() if member.wire and member.wire.is_open]
        return [*connected, *self.strangers, *([self.listening] if self.listening else [])]

    def hear(self) -> None:
        """Take in what has arrived."""
        self._accept()
        for stranger in list(self.strangers):
            for message in stranger.receive()[:1]:  # whoever says more before the answer is no guard
                self._welcome(stranger, message)
            if not stranger.is_open and stranger in self.strangers:
                self.strangers.remove(stranger)
        for member in list(self.members.values()):
            for message in member.wire.receive() if member.wire and member.wire.is_open else ():
                self.take(member, message)

    def _accept(self) -> None:
        while self.listening is not None:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.strangers.append(Connection(connection))

    def _welcome(self, wire: Connection, message: dict[str, Any]) -> None:
        hello = message.get("hello")
        self.strangers.remove(wire)
        is_guard = isinstance(hello, dict) and hello.get("key") == self.key
        rank = hello.get("rank") if is_guard else None
        if rank is None or rank in self.members or not 0 < rank < self.world_size:
            wire.close()
            return
        self.members[rank] = Peer(rank, str(hello.get("host")), wire)
        wire.send({"welcome": self.key})
        if len(self.members) == self.world_size:
            self._close_door()

    def _close_door(self) -> None:
        if self.listening is not None:
            with suppress(OSError):
                self.listening.shutdown(socket.SHUT_RDWR)
            self.listening.close()
            self.listening = None

    def take(self, member: Peer, message: dict[str, Any]) -> None:
        """What a guard says about its rank."""
        member.heard = time.monotonic()
        if "beat" in message:
            beat = message["beat"]
            member.limit = beat["limit"]
            place = member.place
            place.phase, place.step, place.state = beat["phase"], beat["step"], beat["state"]
            place.since = time.monotonic() - beat["seconds"]
        if "failure" in message:
            self.report(Failure.from_json(message["failure"]))
        if "bye" in message:
            member.bye = message["bye"]

    def report(self, failure: Failure) -> None:
        """A sign that the run has failed, stamped on arrival: the clocks of hosts differ."""
        self.reported.append(replace(failure, when=datetime.now().astimezone().isoformat(timespec="milliseconds")))
        self.first_sign = self.first_sign or time.monotonic()

    def tick(self, limits: PhaseTimeouts) -> None:
        """Look at the clock; choose what came first once the first sign has had time to be followed by its cause."""
        now = time.monotonic()
        for member in self.members.values():
            if member.wire is not None:
                member.wire.flush()
                if not member.wire.is_open and member.closed_at is None:
                    member.closed_at = now
        if self.verdict is None and self.first_sign is None:
            self._look_for_silence(now)
            self._look_for_missing(now, limits)
            self._look_for_the_stuck()
        if self.verdict is None and self.first_sign is not None and now - self.first_sign >= SECONDS_TO_SETTLE:
            first = find_first_failure(self.reported)
            if is_secondary(first) and (gone := self._vanished()) is not None:
                self._lose(gone, "its connection ended")  # what the others only heard of
                first = self.reported[-1]
            others = [summarize_failure(one) for one in self.reported if one.error != first.error]
            self.verdict = replace(first, also=[*first.also, *others])
            self._close_door()
            self.send({"end": self.verdict.to_json()})

    def send(self, message: dict[str, Any]) -> None:
        """To all guards."""
        for member in self.members.values():
            if member.wire is not None and member.wire.is_open:
                member.wire.send(message)

    def postpone(self, seconds: float) -> None:
        """This process itself did not run for so long: nobody is to be blamed."""
        self.started += seconds
        for member in self.members.values():
            member.heard += seconds
            member.place.since += seconds

    def is_alone(self) -> bool:
        """Whether all other guards have left."""
        return not any(member.wire is not None and member.wire.is_open for member in self.members.values())

    def _look_for_silence(self, now: float) -> None:
        for member in self.members.values():
            if member.bye is not None or member.wire is None:
                continue
            gone = member.closed_at is not None and now - member.closed_at > SECONDS_FOR_A_GOODBYE
            if gone or now - member.heard > SECONDS_OF_SILENCE:
                how = "its connection ended" if gone else f"nothing was heard of it for {SECONDS_OF_SILENCE:.0f} s"
                self._lose(member, how)
                return

    def _lose(self, member: Peer, how: str) -> None:
        ranks = [one.rank for one in self.members.values() if one.host == member.host]
        text = f"the guard of rank {member.rank} on {member.host} is gone: {how}"
        self.report(self._failure(member, "lost", text, ranks=ranks))

    def _vanished(self) -> Peer | None:
        """One whose connection ended without a goodbye and without a word of what went wrong."""
        heard = {one.rank for one in self.reported}
        silent = (one for one in self.members.values() if one.bye is None and one.rank not in heard)
        return next((one for one in silent if one.closed_at is not None), None)

    def _look_for_missing(self, now: float, limits: PhaseTimeouts) -> None:
        if self.listening is None or not limits.meeting or now - self.started < limits.meeting:
            return
        ranks = [rank for rank in range(self.world_size) if rank not in self.members]
        hosts = sorted({self.host_of(rank) for rank in ranks} - {""})
        names = f" of {', '.join(hosts)}" if hosts else ""
        self.report(
            Failure(
                kind="missing", ranks=ranks, hosts=hosts, phase="rendezvous",
                error=f"{len(ranks)} of {self.world_size} ranks{names} have not arrived within {limits.meeting:.0f} s",
            )
        )  # fmt: skip

    def host_of(self, rank: int) -> str:
        """As the hostfile names it, "" where that is unknown."""
        return self.hosts[rank] if rank < len(self.hosts) else ""

    def _look_for_the_stuck(self) -> None:
        here = [member for member in self.members.values() if member.bye is None]
        if not here or (len(self.members) < self.world_size):
            return
        last = min(member.place.order for member in here)
        behind = [member for member in here if member.place.order == last]
        late = [one for one in behind if one.limit is not None and one.place.seconds() > one.limit]
        if not late:
            return
        halted = [one for one in behind if one.place.state == "T"]
        culprits = halted or (behind if len(behind) < len(here) else [])
        named = culprits[0] if culprits else late[0]
        seconds, limit = late[0].place.seconds(), late[0].limit
        why = f"no progress for {seconds:.0f} s {named.place.words()} (limit {limit:.0f} s)"
        if halted:
            text = f"rank {named.rank} on {named.host} is stopped (SIGSTOP, or a debugger): {why}"
        elif culprits:
            names = ", ".join(f"{one.rank} on {one.host}" for one in culprits[:8])
            text = f"rank {names}: {why}; the others have gone on"
        else:
            text = f"{why} on all ranks: they wait for each other, or for a device or a disk"
        ranks = [one.rank for one in culprits or here]
        self.report(self._failure(named if culprits else None, "stuck", text, ranks=ranks, place=named.place))

    def _failure(
        self, member: Peer | None, kind: str, text: str, *, ranks: list[int], place: RankPhase | None = None
    ) -> Failure:
        place = place or member.place
        return Failure(
            kind=kind, rank=member.rank if member else None, host=member.host if member else None, ranks=ranks,
            error=text, phase=place.phase, step=place.step if place.step >= 0 else None,
            seconds=round(place.seconds(), 1), hints=["State: T (stopped)"] if place.state == "T" else [],
        )  # fmt: skip


def key_of(order: dict[str, Any]) -> str:
    """What the guards of one run know: the launch's own secret where there is one, else what all were started with."""
    import hashlib

    return hashlib.sha256(json.dumps(order["key"]).encode()).hexdigest()
