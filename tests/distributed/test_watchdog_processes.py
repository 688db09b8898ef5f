"""Watchdogs of real ranks: what a run says, and when it ends."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ranks
from tests.helpers.paths import ROOT

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}


RANK = """
import time
from finetune.distributed.watchdog import start_watchdog, watchdog_client
with start_watchdog():
    print(watchdog_client._watchdog.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_stopped_watchdog_continues_when_its_rank_is_killed_and_ends():
    rank = subprocess.Popen([sys.executable, "-c", RANK], env={**os.environ, **ALONE}, stdout=subprocess.PIPE)
    pid = int(rank.stdout.readline())
    watchdog, used = os.pidfd_open(pid), None
    while used != (used := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]):
        time.sleep(0.5)  # until it is past its imports, which take processor time
    signal.pidfd_send_signal(watchdog, signal.SIGSTOP)
    rank.kill()
    rank.wait()
    has_ended = bool(select.select([watchdog], [], [], 10)[0])
    signal.pidfd_send_signal(watchdog, signal.SIGKILL) if not has_ended else None
    rank.stdout.close()
    os.close(watchdog)
    assert has_ended


CAUGHT = """
import time
from contextlib import suppress
from finetune.distributed.watchdog import released_watchdog, start_watchdog, watchdog_client
with suppress(ValueError), released_watchdog(), start_watchdog():
    print(watchdog_client._watchdog.pid, flush=True)
    raise ValueError
time.sleep(60)
"""


def test_a_process_that_catches_the_failure_of_its_training_lives_on():
    process = subprocess.Popen([sys.executable, "-c", CAUGHT], env={**os.environ, **ALONE}, stdout=subprocess.PIPE)
    watchdog = os.pidfd_open(int(process.stdout.readline()))
    assert select.select([watchdog], [], [], 10)[0]  # it would kill the process after 12 s
    assert process.poll() is None
    process.kill()
    process.communicate()
    os.close(watchdog)


@pytest.fixture
def argv(tiny_model, conversation_file, tmp_path):
    named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "output"]
    flags = "--deepspeed zero2 --use_cpu True --num_train_epochs 200 --save_strategy no --logging_steps 1".split()
    return [*map(str, named), *flags]


def page_of(log: Path) -> str:
    """The summary, which a watchdog says after its rank is gone."""
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


@pytest.mark.slow
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
