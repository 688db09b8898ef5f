"""What is recorded and shown when a run fails."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import traceback
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from conftest import ROOT
from failure_texts import OOM, SAMPLES, WATCHDOG, Sample, died, said
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.arguments import known_flags
from finetune.failures import (
    KINDS,
    PHASES,
    Failure,
    first_of,
    is_consequence,
    likely_cause,
    one_line,
    page,
    read,
    write,
)
from finetune.failures.causes import KNOWN
from finetune.zero import shipped_names

FLAGS_OF_OTHERS = {"shm-size", "ipc", "gpus", "pids-limit", "mem"}  # docker's and Slurm's
PLAIN = st.text(st.characters(codec="utf-8"), max_size=200)
FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(KINDS),
    error=st.text(max_size=300),
    run=PLAIN,
    when=st.datetimes().map(lambda when: when.isoformat() + "+08:00") | PLAIN,
    rank=st.none() | st.integers(0, 4096),
    host=st.none() | st.text(max_size=20),
    ranks=st.lists(st.integers(0, 4096), max_size=20),
    hosts=st.lists(st.text(max_size=20), max_size=5),
    status=st.integers(-64, 255),
    signal=st.none() | st.integers(-1, 70),
    phase=st.sampled_from(["", *PHASES]),
    step=st.none() | st.integers(0),
    seconds=st.none() | st.floats(),
    traceback=st.text(max_size=300),
    hints=st.lists(st.text(max_size=100), max_size=4),
    checkpoint=PLAIN,
    also=st.lists(st.text(max_size=100), max_size=10),
)
KEYS = st.sampled_from([one.name for one in fields(Failure)] + ["likely_cause", "new"])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers() | st.text()),
    st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


def at(second: float, failure: Failure, rank: int | None = None) -> Failure:
    return replace(failure, when=f"2026-11-24T10:00:{second:06.3f}+08:00", rank=rank)


# The record


@given(FAILURES)
@settings(max_examples=300, deadline=None)
def test_a_record_goes_through_standard_json_and_comes_back(failure):
    text = json.dumps(failure.to_json(), allow_nan=False, ensure_ascii=False)
    assert Failure.from_json(json.loads(text.encode("utf-8"))) == failure
    assert likely_cause(Failure.from_json(failure.to_json())) == likely_cause(failure)


@given(st.dictionaries(KEYS, VALUES))
@settings(max_examples=300, deadline=None)
def test_any_values_are_read_or_refused(values):
    try:
        failure = Failure.from_json(values)
    except ValueError:
        assert not isinstance(values.get("kind"), str)
    else:
        assert failure.kind == values["kind"].encode("utf-8", "backslashreplace").decode()
        json.dumps(failure.to_json(), allow_nan=False)
        assert page(failure)


def test_what_is_unknown_or_of_another_type_is_left_out():
    failure = Failure.from_json({"kind": "died", "rank": 3, "step": "7", "ranks": [1, "2"], "colour": "red"})
    assert failure == Failure("died", rank=3)
    with pytest.raises(ValueError, match='with a "kind"'):
        Failure.from_json({"rank": 3})
    with pytest.raises(ValueError, match='with a "kind"'):
        Failure.from_json([])


def test_long_texts_are_cut_where_they_say_least():
    failure = said("\n".join(f"line {n}" for n in range(999)), traceback="\n".join(f"frame {n}" for n in range(999)))
    assert failure.error.splitlines() == [f"line {n}" for n in range(40)]
    assert failure.traceback.splitlines() == [f"frame {n}" for n in range(939, 999)]


def test_the_file_is_whole_readable_by_all_and_names_cause_and_next_step(tmp_path):
    before = os.umask(0o077)
    try:
        failure = died(9, rank=3, host="node1", run="r1", error="内存不足：第 3 号进程", hints=["oom_kill 0 -> 1"])
        path = write(tmp_path, failure)
    finally:
        os.umask(before)
    assert path == tmp_path / "failure.json" and os.listdir(tmp_path) == ["failure.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert "内存不足：第 3 号进程" in path.read_text(encoding="utf-8")
    values = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert values["likely_cause"] == asdict(likely_cause(failure))
    assert values["likely_cause"]["title"] == "the host ran out of memory"
    assert read(path) == failure


def test_a_later_failure_of_the_same_run_does_not_take_the_place_of_the_first(tmp_path):
    first, later = at(3, said("first", run="r1")), at(4, said("later", run="r1"))
    path = write(tmp_path, first)
    assert write(tmp_path, later) == path and read(path) == first
    assert write(tmp_path, at(2, later)) and read(path).error == "later"
    assert write(tmp_path, first, replace=True) and read(path) == first
    assert write(tmp_path, replace(later, run="r2")) and read(path).run == "r2"
    assert os.listdir(tmp_path) == ["failure.json"]


def test_runs_without_an_id_are_never_the_same_run(tmp_path):
    write(tmp_path, at(1, said("last week's")))
    assert read(write(tmp_path, at(2, said("today's")))).error == "today's"


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"rank": 1}', "\udcff", "[" * 100_000])
def test_a_broken_record_is_none_and_is_replaced(tmp_path, broken):
    (tmp_path / "failure.json").write_bytes(broken.encode("utf-8", "surrogateescape"))
    assert read(tmp_path / "failure.json") is None
    assert read(write(tmp_path, said("new", run="r1"))).error == "new"


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=True)
    try:
        earlier = write(disk, said("small", run="r1"))
        kept = earlier.read_bytes()
        assert write(disk, said("large", run="r2", traceback="x" * 1999 + "\n" + "y" * 1999)) is None
        assert os.listdir(disk) == ["failure.json"] and earlier.read_bytes() == kept
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_read_only_disk_a_missing_folder_and_a_folder_in_the_way_are_none(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)], check=True)
    try:
        assert write(disk, said("x")) is None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert write(tmp_path / "missing", said("x")) is None and not (tmp_path / "missing").exists()
    (tmp_path / "failure.json").mkdir()
    assert write(tmp_path, said("x")) is None
    assert sorted(os.listdir(tmp_path)) == ["disk", "failure.json"]


def test_a_disk_without_hard_links_gets_the_record_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, later = at(1, said("first", run="r1")), at(2, said("later", run="r1"))
    assert read(write(tmp_path, first)) == first
    assert read(write(tmp_path, later)) == first


def test_many_writers_at_once_leave_the_record_of_one(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from finetune.failures import Failure, write\n"
        "sys.stdin.read()\n"
        "assert write(sys.argv[2], Failure('died', 'x' * 3000, run='r', when='2026-01-01T00:00:00+00:00',"
        " rank=os.getpid()))\n"
    )
    command = [sys.executable, "-S", "-I", "-c", code, str(ROOT), str(tmp_path)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(6)]
    for one in writers:
        one.stdin.close()
    assert [one.wait() for one in writers] == [0] * 6
    assert os.listdir(tmp_path) == ["failure.json"]
    assert read(tmp_path / "failure.json").rank in {one.pid for one in writers}


def test_it_needs_the_standard_library_alone_and_starts_fast():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "from finetune import failures\n"
        "failures.page(failures.Failure('died', signal=9))\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    command = [sys.executable, "-S", "-I", "-X", "importtime", "-c", code, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert {"finetune", "json"} <= found
    assert found - {"finetune"} <= set(sys.stdlib_module_names)
    taken = min(int(re.search(r"(\d+) \| +finetune\.failures$", _import_times(command), re.M)[1]) for _ in range(3))
    assert taken < 500_000  # microseconds; about 40,000 on an idle machine


def _import_times(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


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
    flags = {*known_flags(), *re.findall(r'"--([a-z_]+)"', launcher), *FLAGS_OF_OTHERS}
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
        shown = " ".join(page(sample.failure, width=width).split())
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
    assert is_consequence(message), message
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
    assert is_consequence(text)


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
    assert not is_consequence(text)


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


# The page


def test_the_page_of_a_rank_that_was_killed():
    others = [said("RuntimeError: Connection reset by peer\nmore", rank=rank, host="node0") for rank in range(5)]
    failure = died(
        9, rank=3, host="node1", phase="step", step=1200, hints=["oom_kill 0 -> 1"],
        checkpoint="output/checkpoint-1000", also=list(map(one_line, others)),
    )  # fmt: skip
    lines = page(failure, record="output/failure.json").splitlines()
    assert lines[0] == "The run failed: rank 3 on node1 was killed (SIGKILL) in step 1,200"
    assert lines[1] == "Where: rank 3 on node1, in step 1,200 (oom_kill 0 -> 1)"
    assert lines[2].startswith("Likely cause: the host ran out of memory. ")
    assert any(line.startswith("What to do: ") for line in lines)
    others = lines.index("5 more failed later, mostly because of this; the first 3:")
    assert lines[others + 1 : others + 4] == [
        f"  rank {rank} on node0: RuntimeError: Connection reset by peer" for rank in range(3)
    ]
    assert lines[-2:] == [
        "Record: output/failure.json",
        "Go on from: output/checkpoint-1000 (--resume_from_checkpoint auto)",
    ]


@pytest.mark.parametrize(
    ("failure", "headline"),
    [
        (
            said("x", "error", rank=0, phase="data"),
            "The run failed: rank 0 stopped with an error while data was prepared",
        ),
        (died(11, rank=1, phase="save", step=20), "The run failed: rank 1 crashed (SIGSEGV) in a save, step 20"),
        (
            Failure("died", rank=1, status=0, phase="end"),
            "The run failed: rank 1 ended with status 0 and without a word at the end",
        ),
        (
            Failure("stuck", rank=2, host="b", seconds=301.4, step=7, phase="step"),
            "The run failed: rank 2 on b made no progress for 301 s in step 7",
        ),
        (
            Failure("missing", ranks=[4, 6, 5, 9], hosts=["b", "c"], phase="meeting", seconds=60),
            "The run failed: ranks 4-6, 9 on b, c did not come to where the ranks meet within 60 s",
        ),
        (
            Failure("lost", host="b", phase="model"),
            "The run failed: host b can no longer be reached while the model was loaded",
        ),
        (Failure("launcher", status=-9), "The run failed: the launcher was killed (SIGKILL)"),
        (Failure("launcher", status=3, host="a"), "The run failed: the launcher on a ended with status 3"),
        (Failure("stopped", status=75, step=3), "The run was stopped: it was asked to stop in step 3"),
        (Failure("later kind"), "The run failed: a rank failed"),
    ],
)  # fmt: skip
def test_headlines(failure, headline):
    assert " ".join(page(failure, width=160).splitlines()[0].split()) == headline


@given(FAILURES, st.integers(20, 200))
@settings(max_examples=300, deadline=None)
def test_a_page_is_one_page(failure, width):
    check_page(page(failure, width=width, record="output/failure.json"), width)


def check_page(shown: str, width: int) -> None:
    import unicodedata

    assert len(shown.splitlines()) == shown.count("\n") + 1 <= 25
    for line in shown.splitlines():
        assert sum(1 + (unicodedata.east_asian_width(one) in "WF") for one in line) <= max(width, 60)
    assert "error: " not in shown and "Traceback (most recent" not in shown
    assert not re.search(r'^\s*File "', shown, re.MULTILINE)
    assert shown.isprintable() or all(one == "\n" or one.isprintable() for one in shown)


@pytest.mark.parametrize("width", [40, 80, 100])
def test_very_long_errors_stay_one_page(width):
    try:
        raise RuntimeError(
            "error: " + "a long word " * 5000 + "\nerror: " * 900 + "x" * 9000 + "\x1b[31mred\x1b[0m\r\t\0"
        )
    except RuntimeError as error:
        trace = traceback.format_exc()
        failure = Failure(
            "exception", f"{trace}\n{error}", rank=1, host="h" * 300, traceback=trace, step=5, seconds=7.0,
            hints=["CUDA error: " + "y" * 999] * 9, also=["error: rank 1: " + "z" * 999] * 900,
            checkpoint="/" + "c" * 999,
        )  # fmt: skip
    check_page(page(failure, width=width, record="/" + "r" * 999), width)


def test_an_error_of_cuda_is_still_read():
    shown = page(said("RuntimeError: CUDA error: device-side assert triggered"))
    assert "RuntimeError: CUDA error - device-side assert triggered" in shown
    assert "Likely cause: a token id lies outside the embeddings." in shown


def test_chinese_stays_whole_and_counts_two_columns():
    text = "第三行的数据有问题：" * 12
    shown = page(said(f"ValueError: {text}"), width=80)
    assert text in re.sub(r"\n\s+", "", shown)
    check_page(shown, 80)


def test_a_list_of_faults_keeps_its_lines_and_says_that_there_are_more():
    faults = "20 faulty rows:\n" + "\n".join(f"  a.json, row {n}: no turns" for n in range(20))
    lines = page(said(faults, "error", status=3)).splitlines()
    assert lines[1:7] == ["  20 faulty rows:", *(f"    a.json, row {n}: no turns" for n in range(4)), "  ..."]


def test_colour_is_for_the_headline_alone():
    failure = died(9, rank=3, phase="step", step=12, error="x\ny")
    plain, coloured = page(failure).splitlines(), page(failure, colour=True).splitlines()
    assert coloured[0] == f"\033[1;31m{plain[0]}\033[0m"
    assert coloured[1:] == plain[1:]
