"""What is said in earnest finds its cause, and an echo of another rank's death is told from what came first."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import ROOT
from drawn_failures import at
from failure_texts import OOM, SAMPLES, WATCHDOG, Sample, died, said

from finetune.config import DoctorArguments, known_flags
from finetune.config.deepspeed_config import shipped_names
from finetune.diagnostics import Failure, failure_page, first_of, is_echo, likely_cause
from finetune.diagnostics.causes import KNOWN

FLAGS_OF_OTHERS = {"shm-size", "ipc", "gpus", "pids-limit", "mem"}  # docker's and Slurm's


# Causes


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.title)
def test_what_is_said_in_earnest_finds_its_cause(sample: Sample):
    found = likely_cause(sample.failure)
    assert found is not None and found.title == sample.title


@pytest.mark.parametrize(
    "sample", [one for one in SAMPLES if one.failure.kind == "exception"], ids=lambda one: one.title
)
def test_a_message_that_only_the_traceback_has_finds_it_too(sample: Sample):
    trace = f'Traceback (most recent call last):\n  File "/x/y.py", line 3, in z\n    w()\n{sample.failure.error}'
    found = likely_cause(replace(sample.failure, error="", traceback=trace))
    assert found is not None and found.title == sample.title


def test_every_cause_has_an_example_and_a_title_of_its_own():
    titles = [known.title for known in KNOWN]
    assert len(titles) > 100
    assert sorted(titles) == sorted({sample.title for sample in SAMPLES})


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.title)
def test_what_to_do_names_flags_and_configs_that_exist(known):
    launcher = (Path(__import__("deepspeed").__file__).parent / "launcher/runner.py").read_text(encoding="utf-8")
    of_the_doctor = {one.name for one in fields(DoctorArguments)}
    flags = {*known_flags(), *of_the_doctor, *re.findall(r'"--([a-z_]+)"', launcher), *FLAGS_OF_OTHERS}
    for text in (known.why, known.do):
        assert set(re.findall(r"--([a-z][a-z0-9_-]*)", text)) <= flags
        assert set(re.findall(r"\bzero(?:pp|\d\w*)", text)) <= set(shipped_names())
        for name in re.findall(r"[\w/]+README\.md", text):
            assert (ROOT / name).is_file()
        assert "error: " not in text and text.rstrip(")`'").endswith((".", "auto"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.title)
def test_a_page_shows_a_cause_and_what_to_do_in_full(sample: Sample):
    cause = likely_cause(sample.failure)
    for width in (80, 100, 160):
        shown = " ".join(failure_page(sample.failure, width=width).split())
        assert [text for text in (cause.title, cause.why, cause.do) if " ".join(text.split()) not in shown] == []


def test_nothing_known_is_no_cause():
    assert likely_cause(said("ValueError: the moon is full")) is None
    assert likely_cause(said("a.json, row 3: broken pipe, disk quota exceeded", "error", status=3)) is None
    assert likely_cause(said("disk quota exceeded", "error", status=6)).title == "the disk quota is used up"
    assert "finite" in likely_cause(said("step 429: loss is nan: lower --learning_rate", "error", status=5)).title


def test_frames_and_source_lines_are_no_messages():
    source = '    raise_if("CUDA_HOME", "no space left on device")'
    trace = f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n{source}'
    assert likely_cause(said("ValueError: the moon is full", traceback=trace)) is None


# Echoes of another rank's death

WORKER = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
rank, port, deed = int(sys.argv[1]), sys.argv[2], sys.argv[3]
store = dist.TCPStore("127.0.0.1", int(port), 2, rank == 0, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
values = torch.ones(8)
dist.all_reduce(values)
if rank == int(sys.argv[4]):
    os.kill(os.getpid(), signal.SIGKILL)
for _ in range(100):
    if deed == "all_reduce":
        dist.all_reduce(values)
    elif deed == "barrier":
        dist.barrier()
    elif deed == "objects":
        dist.all_gather_object([None, None], {"rank": rank})
    else:
        dist.new_group([0, 1])
"""


@pytest.mark.parametrize(("deed", "victim"), [("all_reduce", 1), ("barrier", 0), ("objects", 1), ("new_group", 0)])
def test_what_a_rank_says_whose_partner_was_killed_is_an_echo(tmp_path, deed, victim):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "worker.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, deed, str(victim)], stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        for rank in (0, 1)
    ]
    outputs = [one.communicate(timeout=120)[1] for one in ranks]
    assert ranks[victim].returncode == -signal.SIGKILL
    assert ranks[1 - victim].returncode == 1
    trace = outputs[1 - victim]
    message = re.findall(r"^(?:\[rank\d\]: )?([\w.]+(?:Error|Exception): .*)", trace, re.MULTILINE)[-1]
    assert is_echo(Failure("exception", message)), message
    survivor = at(1.0, said(message, traceback=trace), 1 - victim)
    assert likely_cause(survivor).title == "another rank ended first"
    killed = at(1.4, died(9, phase="step", step=1), victim)
    assert first_of([survivor, killed]) == killed


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [10.0.0.5]:4711",
        "torch.distributed.DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
        "server shutdown or crash?",
        "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error",
        "RuntimeError: NCCL communicator was aborted on rank 3.",
        "Work WorkNCCL(SeqNum=3, OpType=ALLREDUCE) was aborted",
        "torch.distributed.DistBackendError: [2] is setting up NCCL communicator, but recvValue failed on SocketImpl",
        "RuntimeError: Socket Timeout",
        "RuntimeError: Broken pipe",
        WATCHDOG,
        "torch.distributed.DistStoreError: wait timeout after 8000ms, keys: /default_pg/0//1//cuda//0",
    ],
)
def test_other_echoes(text):
    assert is_echo(Failure("exception", text))


@pytest.mark.parametrize(
    "text",
    [
        OOM,
        "RuntimeError: CUDA error: device-side assert triggered",
        "OSError: [Errno 28] No space left on device",
        "requests.exceptions.ConnectionError: ('Connection aborted.', ConnectionResetError(104, 'Connection reset by "
        "peer'))",
        "ConnectionRefusedError: [Errno 111] Connection refused",
        "torch.distributed.DistNetworkError: The client socket has timed out after 3000ms while trying to connect to "
        "(127.0.0.1, 29555).",
        "",
    ],
)
def test_what_is_no_echo(text):
    assert not is_echo(Failure("exception", text))


def test_the_first_is_the_one_that_is_no_echo_within_a_second():
    reset = said("RuntimeError: Connection reset by peer")
    echoes = [at(1.0, reset, 0), at(1.1, died(15), 2)]
    cause = at(1.9, said("ValueError: the moon is full"), 3)
    late = at(9.0, died(9), 4)
    assert first_of([late, cause, *echoes]) == cause
    assert first_of([late, *echoes]) == echoes[0]
    assert first_of([late]) == late
    assert first_of([replace(reset, when=""), late]) == late
    assert first_of([replace(reset, when=""), died(9)]) == died(9)
    with pytest.raises(ValueError, match="no failures"):
        first_of([])


def test_offsets_count():
    cause = said("ValueError: x", when="2026-11-24T10:00:01+08:00")
    assert first_of([said("ValueError: y", when="2026-11-24T02:00:59Z"), cause]) == cause


def test_of_ranks_that_hang_the_first_is_the_one_outside_a_collective():
    waits = Failure("stuck", traceback='  File "/x/torch/distributed/distributed_c10d.py", line 3252 in all_reduce')
    stopped = Failure("stuck", hints=["State: T (stopped)"])
    assert first_of([at(1, waits, 0), at(1.2, stopped, 1), at(1.3, waits, 2)]) == at(1.2, stopped, 1)
