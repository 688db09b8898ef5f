"""What goes wrong on one of three hosts ends the run on all of them, in time and with one page that says which; once it
is repaired, the same command goes on from the newest checkpoint."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.host_runs import Cluster, cluster, find, left_behind, until
from tests.helpers.paths import ROOT
from tests.helpers.short_runs import LORA, losses

pytestmark = pytest.mark.hosts

STEPS = 100
FLAGS = (
    f"--max_steps {STEPS} --logging_steps 1 --save_strategy steps --save_steps 5 --per_device_train_batch_size 1 "
    "--deepspeed zero2 --resume_from_checkpoint auto --write_report False"
).split()
# The guards call a host lost after 30 s of silence, and ssh a connection; the rest is for a busy machine.
SECONDS_TO_END, SECONDS_TO_MISS_A_HOST = 40, 90
# What `python` imports at its start, on the one host that has it: a rank that raises once a file is there.
RAISES = """
import ctypes, os, threading, time

class BitFlip(RuntimeError):
    def __str__(self):
        return "a bit flipped on this host"

def wait():
    while not os.path.exists({sign!r}):
        time.sleep(0.05)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.main_thread().ident), ctypes.py_object(BitFlip))

if "RANK" in os.environ:
    threading.Thread(target=wait, daemon=True).start()
"""


@pytest.fixture
def job(three_nodes, tmp_path, tiny_model) -> Iterator[Cluster]:
    with cluster(three_nodes, tmp_path, tiny_model) as made:
        yield made


def started(job: Cluster, step: int, *flags: str | Path, **environment: str) -> subprocess.Popen:
    """A run that has made this step, gone on from the newest checkpoint if there is one."""
    is_first = not list(job.output.glob("checkpoint-*"))
    run = job.start(*FLAGS, *LORA, *flags, **environment)
    said = until(run, f"step {step}/")
    assert ("resuming from" in said) is not is_first, said
    return run


def completes(job: Cluster) -> None:
    said = job.completed(job.start(*FLAGS, *LORA))
    assert "resuming from" in said and len(losses(job.output)) == STEPS
    ran = json.loads((job.output / "run.json").read_text())
    assert (ran["world_size"], ran["completed"]) == (3, True) and not (job.output / "failure.json").exists()


def test_a_rank_that_raises_two_that_are_killed_and_a_network_that_goes(job, three_nodes, tmp_path):
    first, second, third = three_nodes
    nowhere, somewhere = tmp_path / "site", tmp_path / "site of node2"
    nowhere.mkdir()
    somewhere.mkdir()
    (somewhere / "sitecustomize.py").write_text(RAISES.format(sign=str(tmp_path / "now")))
    with third.bound(somewhere, nowhere):
        run = started(job, 7, PYTHONPATH=f"{ROOT}:{nowhere}")
        (tmp_path / "now").touch()
        job.failed(run, "rank 2 on node2", "a bit flipped on this host", "Resume from", within=SECONDS_TO_END)

    run = started(job, 27)
    for node in (second, first):  # one of them where the command was typed
        os.kill(find(node, "--local_rank=0"), signal.SIGKILL)
    job.failed(run, "was killed (SIGKILL)", "on node", "Resume from", within=SECONDS_TO_END)

    run = started(job, 47)
    with second.unplugged():
        job.failed(run, "node1", "Resume from", within=SECONDS_TO_MISS_A_HOST, without=[second])
        until_ended(second)
    second.end_processes()  # what sshd has not missed yet

    completes(job)


def until_ended(host) -> None:
    """A host that nobody reaches ends its part by itself."""
    deadline = time.monotonic() + SECONDS_TO_MISS_A_HOST
    while ours(host) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ours(host) == []


def ours(host) -> list[str]:
    return [line for line in host.processes().values() if "finetune" in line]


@pytest.mark.faults
def test_a_host_that_stands_still_and_one_that_ends_at_once(job, three_nodes):
    first, second, third = three_nodes
    run = started(job, 7)
    with second.paused():
        job.failed(run, "node1", "Resume from", within=SECONDS_TO_MISS_A_HOST, without=[second])
    until_ended(second)
    second.end_processes()

    run = started(job, 27)
    with third.off():
        job.failed(run, "node2", "Resume from", within=SECONDS_TO_MISS_A_HOST, without=[third])

    completes(job)


@pytest.mark.faults
def test_the_launching_host_whose_network_goes_is_missed_by_the_others(job, three_nodes):
    first, second, third = three_nodes
    run = started(job, 7)
    with first.unplugged():
        for node in three_nodes:
            until_ended(node)
    job.failed(run, "can no longer be reached", "Resume from", within=SECONDS_TO_END, without=three_nodes)
    for node in three_nodes:
        until_ended(node)
        node.end_processes()

    completes(job)


@pytest.mark.faults
def test_a_disk_that_is_full_on_one_host_is_named_and_the_run_goes_on_once_there_is_room(job, three_nodes, tmp_path):
    """No disk is shared; the third host has room for one checkpoint only."""
    private = tmp_path / "private"
    private.mkdir()
    job.output = private / "output"
    flags = (
        "--max_steps 12 --logging_steps 1 --save_strategy steps --save_steps 4 --per_device_train_batch_size 1".split()
    )
    flags += ["--deepspeed", "zero3", "--resume_from_checkpoint", "auto"]
    with ExitStack() as disks:
        for node in three_nodes:
            disks.enter_context(node.disk(private, "40m" if node is three_nodes[2] else "1g"))
        run = job.start(*flags)
        said = job.failed(run, "node2", within=120, status=6)
        assert str(job.output) in said, said
        three_nodes[2].resize(private, "1g")
        run = job.start(*flags)
        said = job.ended(run, within=200)
        assert run.returncode == 0, said
        assert "resuming from" in said and "checkpoint-4, step 4" in said
        assert three_nodes[0].run("cat", job.output / "RUN_COMPLETE")


def test_ctrl_c_ends_its_own_job_on_all_hosts_and_no_other(job, three_nodes, tmp_path):
    other = job.start(*FLAGS, *LORA, "--output_dir", tmp_path / "other")
    run = started(job, 7)
    typed = f"finetune train --hostfile=hostfile --model_name_or_path {job.model} --data_path {job.data} "
    assert other.poll() is None  # so that the signal could have reached it
    os.kill(find(three_nodes[0], f"{typed}--output_dir {job.output}"), signal.SIGINT)
    said = run.communicate(timeout=SECONDS_TO_END)[0]
    assert run.returncode == 75, said
    assert "checkpoint-" in said and list(job.output.glob("checkpoint-*/manifest.json"))
    mine = [line for node in three_nodes for line in node.processes().values() if str(job.output) in line]
    assert mine == []

    said = other.communicate(timeout=200)[0]
    assert other.returncode == 0 and (tmp_path / "other/RUN_COMPLETE").is_file(), said
    assert len(losses(tmp_path / "other")) == STEPS
    assert left_behind(three_nodes) == []
