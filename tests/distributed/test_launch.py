"""`finetune launch` on one machine: what it believes, what it passes on, and that nothing outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from finetune.distributed.host_probe import free_port
from finetune.launcher.local_session import HOSTFILE_PLACEHOLDER, LocalSession
from tests.helpers import runs
from tests.helpers.paths import ROOT
from tests.helpers.rows import write_rows

FINETUNE = Path(sys.executable).with_name("finetune")
LIMIT_SECONDS = 240
FLAGS = (
    "--deepspeed zero2 --use_lora True --lora_dropout 0.1 --learning_rate 1e-2 --logging_steps 1 --write_report False"
).split()


@pytest.fixture
def named(tiny_model, tmp_path):
    """The three flags every run needs; eleven rows, so that an epoch has uneven steps."""
    data = write_rows(tmp_path / "rows.json", runs.ROWS)
    return ["--model_name_or_path", tiny_model, "--data_path", data, "--output_dir", tmp_path / "output"]


def launched(named: list, *flags: object) -> subprocess.Popen:
    words = ["train", *named, "--num_gpus", "2", *FLAGS, *flags]
    return subprocess.Popen(
        [FINETUNE, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.faults
def test_ctrl_c_under_bare_deepspeed_saves(named, tmp_path):
    command = [FINETUNE.with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    run = subprocess.Popen(
        list(map(str, [*command, "finetune/finetune.py", *named, *FLAGS, *STOPPABLE])), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until(run, "step 7/")
    os.killpg(run.pid, signal.SIGINT)
    said = ended(run)
    assert "Saved checkpoint-" in said and "has died" not in said, said
    (saved,) = (tmp_path / "output").glob("checkpoint-*")
    assert (saved / "manifest.json").is_file()


def until(process: subprocess.Popen, sign: str) -> str:
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(sign):
            return said
    raise AssertionError(f"{sign!r} was never said:\n{said}")


def ended(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    return said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hostfile=typo", "finetune/finetune.py"], "typo: there is no such file"),
        (["finetune/finetune.py", "--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--num_gpu", "x", "finetune/finetune.py"], "--num_gpus"),
        ([], "no script to launch"),
    ],
)
def test_mistakes_are_found_before_anything_starts(words, message):
    began = time.monotonic()
    done = subprocess.run([FINETUNE, "launch", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("error: ") == 1
    assert done.stdout == "" and time.monotonic() - began < 30


def test_a_run_is_complete_and_leaves_nothing_behind(named, tmp_path):
    run = launched(named, "--max_steps", "2", "--save_strategy", "no")
    said = ended(run)
    assert run.returncode == 0, said
    assert (tmp_path / "output/RUN_COMPLETE").is_file() and "\nDone\n" in said
    assert "[INFO]" not in said


@pytest.mark.slow
def test_an_adapter_as_the_model_is_continued(trained, tiny_model, conversation_file, tmp_path):
    first, output = trained("lora"), tmp_path / "output"
    assert (first / "README.md").is_file() and not [*first.glob("checkpoint-*/README.md")]  # peft's card
    words = f"--model_name_or_path {first} --data_path {conversation_file} --output_dir {output}"
    words += " --max_steps 1 --learning_rate 1e-9 --save_strategy no --write_report False"
    done = subprocess.run(
        [FINETUNE, "train", *words.split()], capture_output=True, text=True, timeout=LIMIT_SECONDS,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},  # no GPU, as people write it
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continuing the adapter {first}" in done.stdout
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, output))
    assert before.keys() == after.keys() and any(tensor.any() for name, tensor in before.items() if "lora_B" in name)
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-6) for name in before)


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["--local_rank=0", "--local_rank=1", "deepspeed.launcher.launch", "deepspeed", None])
def test_whatever_is_killed_all_ends_and_the_dead_part_is_named(named, tmp_path, victim):
    run = launched(named, "--num_train_epochs", "2000", "--save_strategy", "no")
    until(run, "step 3/")
    family = psutil.Process(run.pid).children(recursive=True)
    dying = psutil.Process(run.pid)
    if victim is not None:
        dying = next(one for one in family if any(victim == Path(word).name for word in one.cmdline()[:9]))
    began = time.monotonic()

    dying.kill()
    said = ended(run)

    assert run.returncode not in (0, 75), said
    assert psutil.wait_procs(family, timeout=15)[1] == [] and time.monotonic() - began < 15
    named_as = {"--local_rank=0": "rank 0 on", "--local_rank=1": "rank 1 on", "deepspeed.launcher.launch": victim}
    assert named_as.get(victim, "the deepspeed command") in said[said.index("The run failed") :]
    if victim is not None and victim.startswith("--"):
        assert run.returncode == 137
    assert json.loads((tmp_path / "output/failure.json").read_text())["likely_cause"]["remedy"]
    assert not (tmp_path / "output/RUN_COMPLETE").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model):
    """What the run comes to that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_rows(folder / "rows.json", runs.ROWS)
    flags = ["--model_name_or_path", tiny_model, "--data_path", data, "--output_dir", folder / "output"]
    run = launched(flags, *STOPPABLE)
    said = ended(run)
    assert run.returncode == 0, said
    return runs.result_of(folder / "output")


STOPPABLE = (
    "--num_train_epochs 30 --per_device_train_batch_size 2 --save_strategy no --dataloader_num_workers 2 "
    "--resume_from_checkpoint auto"
).split()


@pytest.mark.faults
@pytest.mark.parametrize("asks", ["TERM launch", "INT launch", "USR1 rank 1", "TERM rank 0", "file"])
def test_a_request_to_stop_saves_one_step_and_the_same_command_goes_on_exactly(named, tmp_path, asks, uninterrupted):
    run = launched(named, *STOPPABLE)
    until(run, "step 7/")
    family = psutil.Process(run.pid).children(recursive=True)
    what, _, who = asks.partition(" ")
    if what == "file":
        (tmp_path / "output/STOP").touch()
    else:
        dying = psutil.Process(run.pid)
        if who != "launch":
            dying = next(one for one in family if f"--local_rank={who[-1]}" in one.cmdline())
        dying.send_signal(getattr(signal, f"SIG{what}"))
    began = time.monotonic()
    said = ended(run)
    assert run.returncode == 75, said
    assert time.monotonic() - began < 20 and psutil.wait_procs(family, timeout=5)[1] == []
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert 7 <= step < 90 and f"checkpoint-{step}" in said and "Traceback" not in said

    run = launched(named, *STOPPABLE)
    said = ended(run)
    assert run.returncode == 0, said
    assert runs.result_of(tmp_path / "output") == uninterrupted
    assert not (tmp_path / "output/STOP").exists()


@pytest.mark.faults
def test_a_request_in_the_middle_of_a_save_is_granted_after_it(named, tmp_path, uninterrupted):
    saving = [*STOPPABLE, "--save_strategy", "steps", "--save_steps", "1"]
    run = launched(named, *saving)
    until(run, "step 7/")
    deadline = time.monotonic() + 30
    while not list((tmp_path / "output").glob("checkpoint-*/saving.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    run.terminate()
    said = ended(run)
    assert run.returncode == 75, said
    sealed = {one.parent.name for one in (tmp_path / "output").glob("checkpoint-*/manifest.json")}
    assert sealed == {one.name for one in (tmp_path / "output").glob("checkpoint-*")} and len(sealed) == 2
    run = launched(named, *saving)
    said = ended(run)
    assert run.returncode == 0, said
    assert runs.result_of(tmp_path / "output") == uninterrupted


@pytest.mark.faults
def test_a_second_signal_leaves_at_once(named):
    run = launched(named, "--num_train_epochs", "2000", "--save_strategy", "no")
    until(run, "step 3/")
    family = psutil.Process(run.pid).children(recursive=True)
    for rank in (one for one in family if any("--local_rank" in word for word in one.cmdline())):
        rank.suspend()  # so that the first request cannot be granted
    run.terminate()
    time.sleep(1)
    began = time.monotonic()
    run.terminate()
    ended(run)
    assert run.returncode == 143 and time.monotonic() - began < 10
    assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.mark.faults
def test_a_request_before_the_first_step_leaves_with_nothing_saved(named, tmp_path):
    run = launched(named, "--num_train_epochs", "2000")
    until(run, "Data")
    run.terminate()
    said = ended(run)
    assert run.returncode == 75, said
    assert not list((tmp_path / "output").glob("checkpoint-*")) and "The run failed" not in said


@pytest.mark.faults
def test_two_runs_at_once_do_not_touch_each_other(named, tmp_path):
    other = [*named[:-1], tmp_path / "other"]
    both = [launched(one, "--max_steps", "30", "--save_strategy", "no") for one in (named, other)]
    said = [ended(run) for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    assert runs.result_of(tmp_path / "output") == runs.result_of(tmp_path / "other")


@pytest.mark.faults
def test_a_token_is_in_no_command_line_and_in_no_file(named, tmp_path):
    run = launched(named, "--max_steps", "40", "--save_strategy", "steps", "--save_steps", "20",
                   "--hub_token", "hf_secretvalue")  # fmt: skip
    said = until(run, "step 3/")
    lines = [one.cmdline() for one in psutil.Process(run.pid).children(recursive=True)]
    assert len(lines) >= 4
    said += ended(run)
    assert run.returncode == 0, said
    kept = [path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert "hf_secretvalue" not in said + str(lines) and not any(b"hf_secretvalue" in one for one in kept)


def test_a_word_of_the_user_that_looks_like_ours_stays_as_it_is(tmp_path):
    seen = tmp_path / "seen.json"
    script = f"import json, sys; open({str(seen)!r}, 'w').write(json.dumps(sys.argv[1:]))"
    words = [HOSTFILE_PLACEHOLDER, "{hostfile}", HOSTFILE_PLACEHOLDER, "it's $(id) 你好"]
    run = LocalSession([sys.executable, "-c", script, *words], {}, hostfile="a slots=1\n", host="a")
    while run.is_running():
        time.sleep(0.01)
    assert run.finish().status == 0
    copy, *others = json.loads(seen.read_text())
    assert copy.startswith("--hostfile=/") and others == words[1:]
    assert not run.folder.exists()
