"""Guards: what a hub concludes from what it hears, and ranks that die, leave early or never come."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest

from finetune.diagnostics import Failure
from finetune.distributed.watchdog import coordinator as hub_room
from finetune.distributed.watchdog import watchdog_process
from finetune.distributed.watchdog.coordinator import Coordinator, Peer, PhaseTimeouts, RankPhase
from finetune.distributed.watchdog.transport import Connection, candidate_ports, listen
from tests.helpers import ranks


def order(world_size: int, port: str | None = None) -> dict:
    port = port or str(ranks.free_port())
    return {"world_size": world_size, "hosts": ["a", "b", "c"][:world_size], "address": "127.0.0.1", "port": port}


@pytest.fixture
def hub():
    """Of three ranks, two of them connected by a real socket; rank 2 is of host c."""
    made = Coordinator(order(3), "key")
    ends = []
    for rank in range(3):
        mine, theirs = socket.socketpair()
        ends += [theirs] if rank else [theirs, mine]
        made.members[rank] = Peer(rank, "abc"[rank], Connection(mine) if rank else None, RankPhase("step", 7))
    made._close_door()
    yield made
    for end in ends:
        end.close()
    for member in made.members.values():
        if member.wire:
            member.wire.close()


def settled(hub: Coordinator, monkeypatch) -> Failure | None:
    monkeypatch.setattr(hub_room, "SECONDS_TO_SETTLE", 0.0)
    hub.tick(PhaseTimeouts())
    hub.tick(PhaseTimeouts())
    return hub.verdict


def test_a_run_in_which_all_make_progress_is_left_alone(hub, monkeypatch):
    for member in hub.members.values():
        member.limit = 5.0
    assert settled(hub, monkeypatch) is None


@pytest.mark.parametrize(
    ("behind", "states", "blamed", "words"),
    [
        (None, {1: "T"}, 1, "rank 1 on b is stopped"),
        (None, {0: "T"}, 0, "rank 0 on a is stopped"),
        (2, {}, 2, "the others have gone on"),
        (None, {}, None, "on all ranks"),
    ],
)
def test_the_one_that_holds_up_the_others_is_named(hub, monkeypatch, behind, states, blamed, words):
    for rank, member in hub.members.items():
        member.limit = 5.0
        member.place.since -= 6
        member.place.state = states.get(rank, "S")
        member.place.step = 6 if rank == behind else 7
    verdict = settled(hub, monkeypatch)
    assert (verdict.kind, verdict.rank) == ("stuck", blamed)
    assert words in verdict.error and "limit 5 s" in verdict.error


def test_who_waits_for_a_slower_one_without_a_limit_is_not_stuck(hub, monkeypatch):
    for rank, member in hub.members.items():
        member.place.phase, member.place.step = ("data", -1) if rank == 1 else ("rendezvous", -1)
        member.limit = None if rank == 1 else 5.0
        member.place.since -= 3600
    assert settled(hub, monkeypatch) is None


def test_a_host_that_falls_silent_or_hangs_up_is_lost(hub, monkeypatch):
    hub.members[2].heard -= 31
    verdict = settled(hub, monkeypatch)
    assert (verdict.kind, verdict.host) == ("lost", "c")

    hub.verdict = hub.first_sign = None
    hub.reported.clear()
    hub.members[2].heard = time.monotonic()
    hub.members[1].wire.close()
    hub.tick(PhaseTimeouts())
    assert hub.first_sign is None  # a moment for its own words
    hub.members[1].closed_at -= 4
    assert settled(hub, monkeypatch).rank == 1


def test_after_a_goodbye_nobody_is_missed(hub, monkeypatch):
    hub.members[1].bye = 0
    hub.members[1].wire.close()
    hub.tick(PhaseTimeouts())
    hub.members[1].closed_at -= 60
    assert settled(hub, monkeypatch) is None


def test_time_in_which_the_guard_itself_did_not_run_is_nobodys_fault(hub, monkeypatch):
    for member in hub.members.values():
        member.limit = 5.0
        member.place.since -= 100
        member.heard -= 100
    hub.postpone(100)
    assert settled(hub, monkeypatch) is None


def test_the_cause_is_told_from_its_echo(hub, monkeypatch):
    echo = "RuntimeError: Read error [127.0.0.1]:9: Connection reset by peer"
    hub.report(Failure(kind="exception", rank=0, host="a", error=echo))
    hub.report(Failure(kind="died", rank=1, host="b", error="rank 1 on b ended without a message"))
    verdict = settled(hub, monkeypatch)
    assert verdict.rank == 1 and verdict.when and len(verdict.also) == 1
    assert "rank 0 on a" in verdict.also[0] and "Connection reset by peer" in verdict.also[0]


def test_a_host_that_vanished_is_blamed_where_the_others_only_heard_of_it(hub, monkeypatch):
    echo = "RuntimeError: Read error [127.0.0.1]:9: Connection reset by peer"
    for rank in (0, 1):
        hub.report(Failure(kind="exception", rank=rank, host="ab"[rank], error=echo))
    hub.members[2].wire.close()
    verdict = settled(hub, monkeypatch)
    assert (verdict.kind, verdict.host) == ("lost", "c") and "its connection ended" in verdict.error
    assert len(verdict.also) == 2


def test_a_rank_that_a_launcher_ended_is_not_blamed_for_one_that_vanished(hub, monkeypatch):
    hub.report(Failure(kind="died", rank=1, host="b", signal=15, error="rank 1 on b ended: signal 15"))
    hub.members[2].wire.close()
    assert (settled(hub, monkeypatch).kind, hub.verdict.host) == ("lost", "c")


def test_a_rank_with_a_reason_of_its_own_is_blamed_whoever_vanished_after_it(hub, monkeypatch):
    hub.report(Failure(kind="exception", rank=1, host="b", error="ValueError: out of range"))
    hub.members[2].wire.close()
    assert settled(hub, monkeypatch).rank == 1


def test_only_those_with_the_key_are_let_in():
    port = str(ranks.free_port())
    hub = Coordinator(order(3, port), "key")
    place = ("127.0.0.1", hub.listening.getsockname()[1])
    assert place[1] in candidate_ports("127.0.0.1", port)
    stranger, friend, twin = (socket.create_connection(place) for _ in range(3))
    for connection, key in ((stranger, "other"), (friend, "key"), (twin, "key")):
        connection.sendall(json.dumps({"hello": {"key": key, "rank": 1, "host": "b"}}).encode() + b"\n")
        time.sleep(0.05)
        hub.hear()
        hub.hear()
    assert friend.recv(100) and stranger.recv(100) == b"" and twin.recv(100) == b""
    assert set(hub.members) == {1} and hub.members[1].host == "b"
    for one in (stranger, friend, twin, hub.members[1].wire.connection, hub.listening):
        one.close()


@pytest.mark.parametrize(
    "said", [b"{}\n{}\n", b'{"hello": "x"}\n', b"[" * 100_000 + b"\n", b'{"hello": {"key": "key"}}\n']
)
def test_a_stranger_that_talks_nonsense_is_sent_away(said):
    hub = Coordinator(order(3), "key")
    with socket.create_connection(("127.0.0.1", hub.listening.getsockname()[1])) as stranger:
        stranger.sendall(said)
        stranger.settimeout(0.02)
        for _ in range(200):
            hub.hear()
            with contextlib.suppress(TimeoutError):
                assert stranger.recv(100) == b""
                break
        assert hub.members == {} and hub.strangers == []
    hub.listening.close()


@pytest.fixture
def guard(monkeypatch):
    """That of rank 1, which has this process for its rank; nothing is written, nothing is ended."""
    made = watchdog_process.Watchdog(
        {**order(2), "rank": 1, "local_rank": 1, "process": os.getpid(), "key": "key"}, b""
    )
    yield made
    os.close(made.pidfd)


@pytest.mark.parametrize(
    ("error", "blamed"),
    [("RuntimeError: Connection reset by peer", ("lost", 0, "a")), ("ValueError: out of range", ("exception", 1))],
)
def test_a_guard_whose_hub_is_gone_blames_no_echo_but_what_its_own_rank_did(guard, error, blamed):
    near, far = socket.socketpair()
    guard.wire = Connection(near)
    far.close()
    guard.wire.receive()
    guard._take({"failure": Failure("exception", error, rank=1).to_json()})
    assert (guard.verdict.kind, guard.verdict.rank, guard.verdict.host)[: len(blamed)] == blamed


def test_a_rank_0_that_never_answers_is_missed_in_time(guard, monkeypatch):
    """A firewall that drops packets: each try takes its second, eight of them longer than a suspension would."""
    clock = [time.monotonic()]

    def drop(*_, timeout: float):
        clock[0] += timeout
        raise TimeoutError

    monkeypatch.setattr(watchdog_process.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog_process.socket, "create_connection", drop)
    began = clock[0]
    while guard.verdict is None and clock[0] < began + 200:
        clock[0] += 0.25
        guard._excuse_suspension()
        guard._hear_hub()
    assert guard.verdict.kind == "missing" and clock[0] - began < 100


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


def test_a_wire_hands_out_whole_messages_and_closes_on_nonsense():
    near, far = socket.socketpair()
    wire = Connection(near)
    far.sendall(b'{"a": 1}\n{"b"')
    assert wire.receive() == [{"a": 1}]
    far.sendall(b": 2}\n[3]\n")
    assert wire.receive() == [{"b": 2}] and wire.is_open
    far.sendall(b"GET / HTTP/1.1\n")
    assert wire.receive() == [] and not wire.is_open
    far.close()


def test_a_step_may_take_ten_times_the_usual_and_no_less_than_five_minutes():
    place, limits = RankPhase("step", 1), PhaseTimeouts()
    assert limits.of(place) == 1800  # the first step of all
    for step in range(2, 8):
        place.since -= 60
        place.move("step", step)
    assert limits.of(place) == pytest.approx(600, rel=0.01)
    place.durations.clear()
    place.move("step", 9)
    assert limits.of(place) == 300
    assert PhaseTimeouts(step=20).of(place) == 20 and PhaseTimeouts(step=0).of(place) is None
    place.move("save", 9)
    assert PhaseTimeouts(save=0).of(place) is None and limits.of(place) == 1800
    assert limits.of(RankPhase("data")) is None


@pytest.fixture
def argv(tiny_model, conversation_file, tmp_path):
    named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "output"]
    flags = "--deepspeed zero2 --use_cpu True --num_train_epochs 200 --save_strategy no --logging_steps 1".split()
    return [*map(str, named), *flags]


def page_of(log: Path) -> str:
    """The summary, which a guard says after its rank is gone."""
    deadline = time.monotonic() + 10
    while "The run failed" not in (said := log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return said[said.index("The run failed") :]


def _train_but_rank_1_leaves(argv: list[str]) -> None:
    import finetune.dataset.dataloader
    from finetune.train import main

    if os.environ["RANK"] == "1":
        plain = finetune.dataset.dataloader.MicroBatchDataset.__getitem__

        def left(self, place):
            if place[0] == 3:
                os._exit(0)
            return plain(self, place)

        finetune.dataset.dataloader.MicroBatchDataset.__getitem__ = left
    main(argv)


def test_a_rank_that_leaves_early_with_status_0_ends_the_run(argv, tmp_path):
    outcome = ranks.run(tmp_path / "logs", _train_but_rank_1_leaves, (argv,))
    assert outcome.statuses[1] == 0 and outcome.statuses[0] != 0, outcome.outputs[0]
    assert "rank 1 on" in page_of(tmp_path / "logs/rank-0.log")
    record = json.loads((tmp_path / "output/failure.json").read_text())
    assert (record["kind"], record["rank"], record["phase"]) == ("died", 1, "step")
    assert not (tmp_path / "output/RUN_COMPLETE").exists()


def _train_but_rank_1_never_comes(argv: list[str]) -> None:
    from finetune.train import main

    if os.environ["RANK"] == "1":
        os._exit(0)
    main(argv)


def test_ranks_that_never_arrive_are_named_in_the_time_stated(argv, tmp_path):
    began = time.monotonic()
    outcome = ranks.run(tmp_path / "logs", _train_but_rank_1_never_comes, ([*argv, "--meeting_timeout", "4"],))
    assert outcome.statuses[0] != 0 and time.monotonic() - began < 60
    said = page_of(tmp_path / "logs/rank-0.log")
    assert "1 of 2 ranks have not arrived within 4 s" in said and "rank 1 did not reach the rendezvous" in said


def test_a_complete_run_says_so_last(argv, tmp_path):
    outcome = ranks.train(tmp_path / "logs", [*argv, "--max_steps", "2"])
    assert outcome.succeeded, outcome.outputs[0]
    run = json.loads((tmp_path / "output/run.json").read_text())
    assert (tmp_path / "output/RUN_COMPLETE").read_text().strip() == run["run_id"]
    assert not (tmp_path / "output/failure.json").exists()
