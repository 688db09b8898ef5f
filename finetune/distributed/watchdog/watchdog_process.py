"""The guard of one rank: a small process beside it, with the standard library and PyYAML alone.

A thread of the rank would stop with it, and wait with it: for a lock, for a device, in a library that does not let
other threads run. This process sees its rank die at once (pidfd), keeps its own clock and its own connections, and
can end the rank whatever that is doing.

    rank --(lines on standard input: phases, errors, goodbye)--> its guard <--(TCP)--> the guard of rank 0
    rank <--(signals: print your stacks, die)------------------- its guard
"""

from __future__ import annotations

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

if __name__ == "__main__":  # run as a file, so that nothing but it is imported
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
from finetune.distributed.watchdog.coordinator import Coordinator, Peer, PhaseTimeouts, RankPhase, key_of
from finetune.distributed.watchdog.transport import PRINT_STACKS, Connection, candidate_ports
from finetune.utils.proc import parent_of, stat_of, state_of

TICK, BEAT = 0.25, 1.0
SECONDS_FOR_OWN_WORDS = 12.0  # for a rank that is saying itself what went wrong
SECONDS_FOR_STACKS = 1.5
SECONDS_AFTER_A_DEATH = 0.5
SECONDS_FOR_OTHERS = 8.0
SECONDS_FOR_THE_HUB = 3.0
SUSPENDED = 5.0


class Watchdog:
    """One rank, watched."""

    def __init__(self, order: dict[str, Any], unread: bytes) -> None:
        self.order, self.unread = order, unread
        self.rank, self.host = order["rank"], os.uname().nodename
        self.process = order["process"]
        self.pidfd = os.pidfd_open(self.process)
        self.key = key_of(order)
        self.limits, self.place = PhaseTimeouts(), RankPhase()
        self.started = self.last_tick = time.monotonic()
        self.last_beat = 0.0
        self.run: dict[str, Any] = {}
        self.bye: int | None = None
        self.told = False
        self.gone_at: float | None = None
        self.ending: tuple[int | None, int | None] = (None, None)
        self.end_at: float | None = None
        self.verdict: Failure | None = None
        self.hub = Coordinator(order, self.key) if self.rank == 0 else None
        if self.hub:
            self.hub.members[0] = Peer(0, self.host, None, place=self.place)
        self.wire: Connection | None = None
        self.heard = time.monotonic()
        self.out_of_memory = _out_of_memory_kills()

    def watch(self) -> None:
        """Until the rank is gone and all is said."""
        while not self._is_over():
            self._wait()
            self._excuse_suspension()
            self._hear_rank()
            if self.hub:
                self.hub.hear()
                self._stand_for_own_rank()
                self.hub.tick(self.limits)
                self._follow(self.hub.verdict)
            else:
                self._hear_hub()
            self._beat()
            self._end_rank()
        self._conclude()

    def _wait(self) -> None:
        waiting = select.poll()
        waiting.register(self.pidfd, select.POLLIN) if self.gone_at is None else None
        if self.unread is not None:
            waiting.register(0, select.POLLIN)
        wires = self.hub.wires() if self.hub else [self.wire] if self.wire and self.wire.is_open else []
        for wire in wires:
            waiting.register(wire.fileno(), select.POLLIN)
        waiting.poll(TICK * 1000)

    def _excuse_suspension(self) -> None:
        """A terminal's Ctrl-Z, or a machine that slept, is no rank's fault."""
        now = time.monotonic()
        gap, self.last_tick = now - self.last_tick, now
        if gap > SUSPENDED:
            self.heard += gap
            self.started += gap
            self.place.since += gap
            if self.hub:
                self.hub.postpone(gap)

    def _hear_rank(self) -> None:
        gone = self.gone_at is None and bool(select.select([self.pidfd], [], [], 0)[0])
        while self.unread is not None and select.select([0], [], [], 0)[0]:
            chunk = os.read(0, 1 << 16)
            *lines, rest = (self.unread + chunk).split(b"\n")
            self.unread = rest if chunk else None
            for line in lines:
                self._take(json.loads(line))
        if gone:
            self.gone_at = time.monotonic()
            self.ending = _ending(self.process)
            if self.bye is None and not self.told:
                self._tell(self._death())

    def _take(self, message: dict[str, Any]) -> None:
        if "phase" in message:
            self.place.move(message["phase"], message.get("step"))
        if "limits" in message:
            self.limits = PhaseTimeouts(**message["limits"])
        if "run" in message:
            self.run = message["run"]
        if "failure" in message:
            self.told = True
            self._tell(Failure.from_json(message["failure"]))
        if "bye" in message:
            self.bye = message["bye"]
            self._leave_word({"status": self.bye})
            self._send({"bye": self.bye})

    def _tell(self, failure: Failure) -> None:
        self._send({"failure": failure.to_json()})

    def _send(self, message: dict[str, Any]) -> None:
        if self.hub:
            self.hub.take(self.hub.members[0], message)
        elif self.wire and self.wire.is_open:
            self.wire.send(message)
        elif "failure" in message:
            failure = Failure.from_json(message["failure"])
            self._follow(self._loss_of_the_hub() if self.wire and is_secondary(failure) else failure)

    def _death(self) -> Failure:
        """What can be known of a process that ended without a message."""
        launcher = self.order["launcher"]
        if launcher and parent_of(launcher) is None:
            error = f"deepspeed.launcher.launch (process {launcher}) has died, and its ranks with it"
            return self._failure("launcher", error, rank=None)
        number, status = self.ending
        how = f"signal {number}" if number else "killed, or crashed" if status is None else f"status {status}"
        error = f"rank {self.rank} on {self.host} ended without a message: {how}"
        kills = _out_of_memory_kills()
        hints = [f"oom_kill {self.out_of_memory} -> {kills}"] if kills > self.out_of_memory else []
        died = {"signal": number, "status": 128 + number} if number else {"status": status or 1}
        return self._failure("died", error, hints=hints, **died)

    def _failure(self, kind: str, error: str, **known: Any) -> Failure:
        place = self.place
        known = {"rank": self.rank, "host": self.host, "phase": place.phase, **known}
        return Failure(kind=kind, error=error, step=place.step if place.step >= 0 else None, **known)

    def _stand_for_own_rank(self) -> None:
        me = self.hub.members[0]
        me.heard, me.limit, me.bye = time.monotonic(), self.limits.of(self.place), self.bye
        self.place.state = state_of(self.process)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self.last_beat < BEAT:
            return
        self.last_beat = now
        if self.hub:
            self.hub.send({"alive": True})
        elif self.wire and self.wire.is_open:
            place = self.place
            beat = {"phase": place.phase, "step": place.step, "seconds": place.seconds()}
            self.wire.send({"beat": {**beat, "limit": self.limits.of(place), "state": state_of(self.process)}})

    def _hear_hub(self) -> None:
        now = time.monotonic()
        if self.wire is None:
            if self.gone_at is None and self.verdict is None:
                self._connect()
                self.last_tick = time.monotonic()  # to wait for an answer is no suspension
            limit = self.limits.meeting
            if self.wire is None and limit and now - self.started > limit + 15:
                self._follow(
                    self._failure(
                        "missing", f"rank 0 at {self.order['address']} was not reached within {limit + 15:.0f} s",
                        rank=None, ranks=[0], hosts=self.order["hosts"][:1], phase="rendezvous",
                    )
                )  # fmt: skip
            return
        for message in self.wire.receive() if self.wire.is_open else ():
            self.heard = now
            if "end" in message:
                self._follow(Failure.from_json(message["end"]))
        silence = now - self.heard
        if self.bye is None and (silence > 30 or (not self.wire.is_open and silence > SECONDS_FOR_THE_HUB)):
            self._follow(self._loss_of_the_hub())

    def _loss_of_the_hub(self) -> Failure:
        error = f"the guard of rank 0 at {self.order['address']} is gone"
        return self._failure("lost", error, rank=0, host=(self.order["hosts"] or [None])[0], ranks=[0])

    def _connect(self) -> None:
        for port in candidate_ports(self.order["address"], self.order["port"]):
            try:
                connection = socket.create_connection((self.order["address"], port), timeout=1.0)
            except OSError:
                continue
            with suppress(OSError, ValueError):
                hello = {"key": self.key, "rank": self.rank, "host": self.host}
                connection.sendall(json.dumps({"hello": hello}).encode() + b"\n")
                connection.settimeout(2.0)
                answer = connection.makefile("rb").readline()
                if json.loads(answer).get("welcome") == self.key:
                    self.wire, self.heard = Connection(connection), time.monotonic()
                    return
            connection.close()

    def _follow(self, verdict: Failure | None) -> None:
        """The run has failed: set the moment at which the rank must be gone, and leave the record."""
        if verdict is None or self.verdict is not None:
            return
        newest = _newest_checkpoint(self.run.get("output_dir"))
        verdict = self.verdict = replace(verdict, run=self.run.get("run_id", ""), checkpoint=newest)
        self._leave_word(verdict.to_json(), FAILURE_FILE)
        writes = self.run.get("output_dir") and (self.rank == 0 or (verdict.kind == "lost" and self._is_first_here()))
        if writes:
            write_failure(Path(self.run["output_dir"]), verdict)
        now = time.monotonic()
        if verdict.kind in ("stuck", "missing", "lost"):
            self._ask_for_stacks()
            self.end_at = now + SECONDS_FOR_STACKS
        else:
            own_words = self.told or verdict.kind == "error"
            self.end_at = now + (SECONDS_FOR_OWN_WORDS if own_words else SECONDS_AFTER_A_DEATH)

    def _ask_for_stacks(self) -> None:
        if self.gone_at is not None or self.place.phase == "start":
            return
        print(f"stacks of rank {self.rank} on {self.host} (process {self.process}):", file=sys.stderr, flush=True)
        with suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, PRINT_STACKS)

    def _end_rank(self) -> None:
        if self.end_at is not None and self.gone_at is None and time.monotonic() >= self.end_at:
            with suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _is_first_here(self) -> bool:
        return self.order["local_rank"] == 0

    def _is_over(self) -> bool:
        if self.gone_at is None:
            return False
        waited = time.monotonic() - self.gone_at
        if self.hub:
            all_said = self.verdict is not None or (self.bye is not None and self.hub.first_sign is None)
            return (all_said and self.hub.is_alone()) or waited > SECONDS_FOR_OTHERS + SECONDS_FOR_OWN_WORDS
        return self.bye is not None or self.verdict is not None or waited > SECONDS_FOR_OTHERS

    def _conclude(self) -> None:
        """The summary is the last that is said, where no `finetune launch` says it."""
        verdict = self.verdict
        if verdict is None:
            return
        speaks = self.rank == 0 or (self._is_first_here() and (verdict.kind == "lost" or self.wire is None))
        supervisor = self.order.get("supervisor")
        if speaks and not (supervisor and state_of(supervisor) not in "?Z") and (verdict.kind != "error" or self.run):
            record = str(Path(self.run["output_dir"], FAILURE_FILE)) if self.run else ""
            page = format_failure_page(verdict, colour=sys.stderr.isatty(), record=record)
            print(f"\n{page}", file=sys.stderr, flush=True)

    def _leave_word(self, word: dict[str, Any], name: str | None = None) -> None:
        """For the `finetune launch` of this host."""
        folder = self.order.get("launch_dir")
        if not folder:
            return
        path = Path(folder, name or f"rank-{self.rank}.json")
        with suppress(OSError):  # the launch is gone, and its folder with it
            scratch = path.with_suffix(f".{self.rank}")
            scratch.write_text(json.dumps(word), encoding="utf-8")
            scratch.replace(path)


def _ending(process: int) -> tuple[int | None, int | None]:
    """The signal that ended a process, or its exit status, while its parent has not fetched it (proc(5): exit_code)."""
    fields = stat_of(process)
    if not fields or fields[0] != "Z":
        return None, None
    code = int(fields[49])
    return (code & 0x7F, None) if code & 0x7F else (None, code >> 8)


def _newest_checkpoint(output_dir: str | None) -> str:
    """The newest sealed one, "" where there is none. What was set aside (`checkpoint-8.later-...`) is none."""
    sealed = [path.parent for path in Path(output_dir).glob("checkpoint-*/manifest.json")] if output_dir else []
    steps = {int(match[1]): one for one in sealed if (match := re.fullmatch(r"checkpoint-(\d+)", one.name))}
    return str(steps[max(steps)]) if steps else ""


def _out_of_memory_kills() -> int:
    """How often the kernel has ended a process for lack of memory, on this machine (/proc/vmstat, since Linux 4.13)."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def main() -> None:
    """Read the order, then watch."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    unread = b""
    while b"\n" not in unread:
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return
        unread += chunk
    line, _, unread = unread.partition(b"\n")
    load_known_causes()  # now, because the disk may not respond once they are needed
    with suppress(ProcessLookupError):  # the rank is gone already
        Watchdog(json.loads(line), unread).watch()


if __name__ == "__main__":
    main()
