"""The watchdog: what the coordinator concludes from messages, and what watchdogs say to each other."""

import contextlib
import json
import os
import socket
import time

import pytest

from finetune.diagnostics import Failure
from finetune.distributed.watchdog import coordinator as coordinator_module
from finetune.distributed.watchdog import watchdog_process
from finetune.distributed.watchdog.coordinator import Coordinator, Peer, PhaseTimeouts, RankProgress
from finetune.distributed.watchdog.transport import Connection, candidate_ports, listen
from tests.helpers import ranks


def run_of(world_size: int, port: str | None = None) -> dict:
    port = port or str(ranks.free_port())
    hosts = ["a", "b", "c"][:world_size]
    return {"world_size": world_size, "hosts": hosts, "address": "127.0.0.1", "port": port, "key": "key"}


@pytest.fixture
def coordinator():
    """One of three ranks, two of them connected by a real socket; rank 2 is on host c."""
    made = Coordinator(**run_of(3))
    ends = []
    for rank in range(3):
        near, far = socket.socketpair()
        ends += [far] if rank else [far, near]
        made.peers[rank] = Peer(rank, "abc"[rank], Connection(near) if rank else None, RankProgress("step", 7))
    made.stop_accepting()
    yield made
    for end in ends:
        end.close()
    for peer in made.peers.values():
        if peer.connection:
            peer.connection.close()


def first_failure(coordinator: Coordinator, monkeypatch) -> Failure | None:
    monkeypatch.setattr(coordinator_module, "SECONDS_TO_SETTLE", 0.0)
    coordinator.check(PhaseTimeouts())
    coordinator.check(PhaseTimeouts())
    return coordinator.first_failure


def test_a_run_in_which_all_make_progress_has_no_failure(coordinator, monkeypatch):
    for peer in coordinator.peers.values():
        peer.timeout = 5.0
    assert first_failure(coordinator, monkeypatch) is None


@pytest.mark.parametrize(
    ("behind", "states", "blamed", "words"),
    [
        (None, {1: "T"}, 1, "rank 1 on b is stopped"),
        (None, {0: "T"}, 0, "rank 0 on a is stopped"),
        (2, {}, 2, "the other ranks have continued"),
        (None, {}, None, "on all ranks"),
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(coordinator, monkeypatch, behind, states, blamed, words):
    for rank, peer in coordinator.peers.items():
        peer.timeout = 5.0
        peer.progress.since -= 6
        peer.progress.state = states.get(rank, "S")
        peer.progress.step = 6 if rank == behind else 7
    failure = first_failure(coordinator, monkeypatch)
    assert (failure.kind, failure.rank) == ("stuck", blamed)
    assert words in failure.error and "limit 5 s" in failure.error


def test_a_rank_that_waits_for_one_without_a_timeout_is_not_stuck(coordinator, monkeypatch):
    for rank, peer in coordinator.peers.items():
        peer.progress.phase, peer.progress.step = ("data", -1) if rank == 1 else ("rendezvous", -1)
        peer.timeout = None if rank == 1 else 5.0
        peer.progress.since -= 3600
    assert first_failure(coordinator, monkeypatch) is None


@pytest.mark.parametrize(("phase", "stopped"), [("start", 0), ("start", 1), ("data", 1)])
def test_a_rank_that_stops_before_it_has_limits_of_its_own_is_stuck(coordinator, monkeypatch, phase, stopped):
    for rank, peer in coordinator.peers.items():
        peer.progress.phase, peer.progress.step = (phase if rank == stopped else "rendezvous", -1)
        peer.timeout = {"start": 1800.0, "data": None}[phase] if rank == stopped else 30.0
        peer.progress.since -= 31 if rank == stopped else 5
    coordinator.peers[stopped].progress.state = "T"
    assert (first_failure(coordinator, monkeypatch) is None) == (phase == "data")
    if phase == "data":  # its time counts from the stop
        coordinator.peers[stopped].stopped_at -= 31
    failure = first_failure(coordinator, monkeypatch)
    assert failure.rank == stopped and "is stopped" in failure.error and "limit 30 s" in failure.error


def test_a_host_without_heartbeat_or_connection_is_lost(coordinator, monkeypatch):
    coordinator.peers[2].last_heard -= 31
    failure = first_failure(coordinator, monkeypatch)
    assert (failure.kind, failure.host) == ("lost", "c")

    coordinator.first_failure = coordinator.first_report_at = None
    coordinator.reports.clear()
    coordinator.peers[2].last_heard = time.monotonic()
    coordinator.peers[1].connection.close()
    coordinator.check(PhaseTimeouts())
    assert coordinator.first_report_at is None  # a moment for its own words
    coordinator.peers[1].closed_at -= 4
    assert first_failure(coordinator, monkeypatch).rank == 1


def test_a_rank_that_has_exited_is_not_lost(coordinator, monkeypatch):
    coordinator.peers[1].exit_status = 0
    coordinator.peers[1].connection.close()
    coordinator.check(PhaseTimeouts())
    coordinator.peers[1].closed_at -= 60
    assert first_failure(coordinator, monkeypatch) is None


def test_a_pause_of_the_watchdog_itself_is_no_rank_s_fault(coordinator, monkeypatch):
    for peer in coordinator.peers.values():
        peer.timeout = 5.0
        peer.progress.since -= 100
        peer.last_heard -= 100
    coordinator.postpone(100)
    assert first_failure(coordinator, monkeypatch) is None


def test_a_secondary_failure_is_not_the_first(coordinator, monkeypatch):
    echo = "RuntimeError: Read error [127.0.0.1]:9: Connection reset by peer"
    coordinator.report(Failure(kind="exception", rank=0, host="a", error=echo))
    coordinator.report(Failure(kind="died", rank=1, host="b", error="rank 1 on b ended without a message"))
    failure = first_failure(coordinator, monkeypatch)
    assert failure.rank == 1 and failure.when and len(failure.also) == 1
    assert "rank 0 on a" in failure.also[0] and "Connection reset by peer" in failure.also[0]


def test_a_host_that_vanished_is_named_if_the_others_only_report_secondary_failures(coordinator, monkeypatch):
    echo = "RuntimeError: Read error [127.0.0.1]:9: Connection reset by peer"
    for rank in (0, 1):
        coordinator.report(Failure(kind="exception", rank=rank, host="ab"[rank], error=echo))
    coordinator.peers[2].connection.close()
    failure = first_failure(coordinator, monkeypatch)
    assert (failure.kind, failure.host) == ("lost", "c") and "its connection ended" in failure.error
    assert len(failure.also) == 2


def test_a_rank_that_a_launcher_ended_is_not_the_cause(coordinator, monkeypatch):
    coordinator.report(Failure(kind="died", rank=1, host="b", signal=15, error="rank 1 on b ended: signal 15"))
    coordinator.peers[2].connection.close()
    assert (first_failure(coordinator, monkeypatch).kind, coordinator.first_failure.host) == ("lost", "c")


def test_a_primary_failure_is_named_whoever_vanishes_after_it(coordinator, monkeypatch):
    coordinator.report(Failure(kind="exception", rank=1, host="b", error="ValueError: out of range"))
    coordinator.peers[2].connection.close()
    assert first_failure(coordinator, monkeypatch).rank == 1


def test_only_connections_with_the_key_become_peers():
    port = str(ranks.free_port())
    coordinator = Coordinator(**run_of(3, port))
    place = ("127.0.0.1", coordinator.server.getsockname()[1])
    assert place[1] in candidate_ports("127.0.0.1", port)
    stranger, friend, twin = (socket.create_connection(place) for _ in range(3))
    for connection, key in ((stranger, "other"), (friend, "key"), (twin, "key")):
        connection.sendall(json.dumps({"hello": {"key": key, "rank": 1, "host": "b"}}).encode() + b"\n")
        time.sleep(0.05)
        coordinator.receive()
        coordinator.receive()
    assert friend.recv(100) and stranger.recv(100) == b"" and twin.recv(100) == b""
    assert set(coordinator.peers) == {1} and coordinator.peers[1].host == "b"
    for one in (stranger, friend, twin, coordinator.peers[1].connection.connection, coordinator.server):
        one.close()


@pytest.mark.parametrize(
    "said", [b"{}\n{}\n", b'{"hello": "x"}\n', b"[" * 100_000 + b"\n", b'{"hello": {"key": "key"}}\n']
)
def test_a_connection_that_sends_anything_else_is_closed(said):
    coordinator = Coordinator(**run_of(3))
    with socket.create_connection(("127.0.0.1", coordinator.server.getsockname()[1])) as stranger:
        stranger.sendall(said)
        stranger.settimeout(0.02)
        for _ in range(200):
            coordinator.receive()
            with contextlib.suppress(TimeoutError):
                assert stranger.recv(100) == b""
                break
        assert coordinator.peers == {} and coordinator.pending == []
    coordinator.server.close()


@pytest.fixture
def watchdog(monkeypatch):
    """That of rank 1, which has this process for its rank; nothing is written, nothing is ended."""
    made = watchdog_process.Watchdog({**run_of(2), "rank": 1, "local_rank": 1, "pid": os.getpid()})
    yield made
    os.close(made.pidfd)


def test_a_pause_of_the_machine_is_credited_once_to_rank_0():
    made = watchdog_process.Watchdog({**run_of(2), "rank": 0, "local_rank": 0, "pid": os.getpid()})
    now = time.monotonic()
    made.last_poll = made.started = made.progress.since = now - 100
    made._skip_suspension()
    assert made.progress.seconds() == pytest.approx(0, abs=10) and made.started == pytest.approx(now, abs=10)
    made.coordinator.stop_accepting()
    os.close(made.pidfd)


@pytest.mark.parametrize(
    ("error", "blamed"),
    [("RuntimeError: Connection reset by peer", ("lost", 0, "a")), ("ValueError: out of range", ("exception", 1))],
)
def test_without_a_coordinator_only_a_primary_failure_of_the_own_rank_counts(watchdog, error, blamed):
    near, far = socket.socketpair()
    watchdog.connection = Connection(near)
    far.close()
    watchdog.connection.receive()
    watchdog._handle({"failure": Failure("exception", error, rank=1).to_json()})
    assert (watchdog.failure.kind, watchdog.failure.rank, watchdog.failure.host)[: len(blamed)] == blamed


def test_a_rank_0_that_never_answers_is_reported_missing(watchdog, monkeypatch):
    """A firewall that drops packets: each try takes its second, eight of them longer than a suspension would."""
    clock = [time.monotonic()]

    def drop(*_, timeout: float):
        clock[0] += timeout
        raise TimeoutError

    monkeypatch.setattr(watchdog_process.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog_process.socket, "create_connection", drop)
    began = clock[0]
    while watchdog.failure is None and clock[0] < began + 200:
        clock[0] += 0.25
        watchdog._skip_suspension()
        watchdog._read_coordinator()
    assert watchdog.failure.kind == "missing" and clock[0] - began < 80


def test_the_newest_checkpoint_is_none_that_was_set_aside(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-12", "checkpoint-4.later-20260101-101010"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-12":
            (tmp_path / name / "manifest.json").touch()
    assert watchdog_process._newest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert (
        watchdog_process._newest_checkpoint(str(tmp_path / "none")) == watchdog_process._newest_checkpoint(None) == ""
    )


def test_a_port_that_is_taken_is_passed_over():
    ports = candidate_ports("127.0.0.1", "1")
    assert len(set(ports)) == len(ports)
    first = listen("127.0.0.1", ports)
    second = listen("127.0.0.1", ports)
    assert first.getsockname()[1] in ports and second.getsockname()[1] in ports
    assert first.getsockname()[1] != second.getsockname()[1]
    first.close()
    second.close()


def test_a_connection_returns_whole_messages_and_closes_on_anything_else():
    near, far = socket.socketpair()
    connection = Connection(near)
    far.sendall(b'{"a": 1}\n{"b"')
    assert connection.receive() == [{"a": 1}]
    far.sendall(b": 2}\n[3]\n")
    assert connection.receive() == [{"b": 2}] and connection.is_open
    far.sendall(b"GET / HTTP/1.1\n")
    assert connection.receive() == [] and not connection.is_open
    far.close()


def test_a_step_may_take_ten_medians_and_no_less_than_five_minutes():
    progress, timeouts = RankProgress("step", 1), PhaseTimeouts()
    assert timeouts.of(progress) == 1800  # the first step of all
    for step in range(2, 8):
        progress.since -= 60
        progress.move("step", step)
    assert timeouts.of(progress) == pytest.approx(600, rel=0.01)
    progress.step_seconds.clear()
    progress.move("step", 9)
    assert timeouts.of(progress) == 300
    assert PhaseTimeouts(step=20).of(progress) == 20 and PhaseTimeouts(step=0).of(progress) is None
    progress.move("save", 9)
    assert PhaseTimeouts(save=0).of(progress) is None and timeouts.of(progress) == 1800
    assert timeouts.of(RankProgress("data")) is None


def test_a_lost_host_is_not_waited_for(coordinator):
    assert not coordinator.is_alone()
    for peer in coordinator.peers.values():
        peer.last_heard -= 31
    assert coordinator.is_alone() and coordinator.peers[1].is_connected()
