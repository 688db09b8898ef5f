"""`finetune doctor` on one machine: the words it takes, what it finds, the status that the run would end with."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.doctor import parse_options
from finetune.preflight import SECTIONS, DoctorReport
from finetune.utils.errors import ConfigError, DataError, StorageError
from tests.helpers import ranks
from tests.helpers.short_runs import SHORT
from tests.helpers.verbs import finetune_text

LIMIT_SECONDS = 240
TRAINING = "--model_name_or_path M --data_path D --output_dir O".split()


class TestWords:
    @pytest.mark.parametrize(
        "words",
        [
            "--hostfile=h --include node0@node1 {} --json",
            "--json --hostfile h -i node0@node1 finetune/finetune.py {}",
            "--hostfile h --include=node0@node1 --module finetune.train {} --json True",
            "{} --hostfile h --json --include node0@node1",
        ],
    )
    def test_the_script_may_stand_there_or_not(self, words):
        choice, flags, rest = parse_options(words.format(" ".join(TRAINING)).split())
        assert choice.json and not choice.full
        assert (flags.hostfile, flags.include) == ("h", "node0@node1")
        assert rest == TRAINING

    def test_a_name_that_both_know_is_the_trainings_unless_the_script_stands_between(self):
        _, flags, rest = parse_options([*TRAINING, "--log_level", "info"])
        assert rest[-2:] == ["--log_level", "info"] and "log_level" not in flags.given
        _, flags, rest = parse_options(["--log_level", "debug", "finetune/finetune.py", *TRAINING])
        assert rest == TRAINING and flags.given["log_level"] == "debug"

    def test_flags_without_a_value_take_none(self):
        _, flags, rest = parse_options(["--no_ssh_check", *TRAINING, "--force_multi", "--bf16", "True"])
        assert flags.no_ssh_check and flags.given["force_multi"]
        assert rest == [*TRAINING, "--bf16", "True"]

    def test_a_wrong_value_of_the_launcher_is_an_error(self):
        with pytest.raises(ConfigError, match="--num_gpus.*whole number"):
            parse_options(["--num_gpus", "two", *TRAINING])

    @pytest.mark.parametrize("words", ["--exclude=localhost", "--exclude=localhost:0"])
    def test_a_filter_that_leaves_no_slot_is_a_finding_too(self, words):
        done = doctor(words, *TRAINING, "--json")
        (finding,) = json.loads(done.stdout)["findings"]
        assert done.returncode == 2
        assert finding["text"].startswith(f"{words.replace('=', ' ')}: no slot of this machine is left")


class TestStatus:
    def test_it_is_that_of_the_first_section_that_a_run_comes_to(self):
        examination = DoctorReport()
        assert examination.status == 0
        examination.warn("hosts", "a clock")
        assert examination.status == 0
        examination.add_error("disk", "full", status=StorageError.status)
        assert examination.status == 6
        examination.attempt("data", lambda: (_ for _ in ()).throw(DataError("bad rows")))
        assert examination.status == 3
        examination.add_error("hosts", "a version", host="node1")
        assert examination.status == 2 and str(examination.findings[-1]) == "node1: a version"
        assert {one.section for one in examination.findings} <= set(SECTIONS)

    def test_what_two_sections_run_into_is_said_once(self):
        examination = DoctorReport()
        for section in ("configuration", "data"):
            examination.attempt(section, lambda: (_ for _ in ()).throw(ConfigError("there is no such folder")))
        assert [one.section for one in examination.findings] == ["configuration"]

    def test_a_bug_is_not_taken_for_a_finding(self):
        with pytest.raises(ZeroDivisionError):
            DoctorReport().attempt("data", lambda: 1 // 0)


def doctor(*words: object, **variables: str) -> subprocess.CompletedProcess:
    return finetune_text("doctor", *words, OMP_NUM_THREADS="1", **variables)


def found_by(done: subprocess.CompletedProcess) -> dict[str, Any]:
    found = json.loads(done.stdout)
    assert found["status"] == done.returncode, done.stderr
    return found


@pytest.fixture
def named(tiny_model: Path, conversation_file: Path, tmp_path: Path) -> list[object]:
    output = ("--output_dir", tmp_path / "output")
    return ["--model_name_or_path", tiny_model, "--data_path", conversation_file, *output, *SHORT]


def test_it_foresees_what_the_run_then_does(named, tmp_path):
    done = doctor("--num_gpus", "2", *named, "--deepspeed", "zero2", "--bf16", "True", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = found_by(done)
    assert found["findings"] == [] and not (tmp_path / "output").exists()

    outcome = ranks.train(tmp_path / "logs", [*named, "--deepspeed", "zero2", "--bf16", "True"])

    assert outcome.succeeded, outcome.outputs
    ran = json.loads((tmp_path / "output/run.json").read_text())
    configuration = found["configuration"]
    batches = configuration["batches"]
    assert configuration["world_size"] == ran["world_size"] == 2
    assert configuration["precision"] == ran["precision"] and configuration["notes"] == ran["notes"]
    assert (batches["steps"], batches["batching"]) == (ran["result"]["steps"], ran["batching"])
    assert batches["selects_logits"] == ran["selects_logits"]
    assert batches["arithmetic"] == "1 per device x 1 accumulated x 2 ranks = 2 examples"
    assert found["data"]["fingerprint"] == ran["data"]["fingerprint"]
    assert found["data"]["tokens"] == ran["data"]["summary"]["tokens"]
    zero = configuration["deepspeed"]["zero_optimization"]
    assert zero["stage"] == ran["deepspeed"]["zero_optimization"]["stage"] == 2


def test_everything_that_is_wrong_is_said_at_once_with_the_status_of_the_first(named, tmp_path):
    (tmp_path / "bad.json").write_text('[{"conversations": [{"from": "human", "value": "?"}]}]')
    lock = tmp_path / "extensions/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    flags = ("--data_path", tmp_path / "bad.json", "--attn_implementation", "eager", "--gradient_clipping", "1")

    done = doctor(*named, "--data_path", tmp_path / "bad.json", "--deepspeed", "zero9", "--json")

    rows, flag = found_by(done)["findings"]
    assert done.returncode == rows["status"] == 3 and rows["section"] == flag["section"] == "configuration"
    assert "bad.json, row 0" in rows["text"] and "zero9" in flag["text"]
    assert "Traceback" not in done.stderr
    done = doctor(*named, "--json", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    sections = {one["section"]: one for one in found_by(done)["findings"]}
    assert sections["this host"]["status"] == 0 and "min ago: other tools" in sections["this host"]["text"]
    done = doctor(*named, *flags, "--json")
    assert found_by(done)["findings"][0]["section"] == "command" and "--gradient_clipping" in done.stdout


@pytest.mark.slow
def test_the_compilers_own_words_are_shown_and_a_terminal_gets_lines(named, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *--version*|*-dump*|*-v*) exec g++ "$@";; esac\n'
        'echo "shm.h:1:10: fatal error: omp.h: No such file or directory" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}

    done = doctor("--num_gpus", "2", *named, "--deepspeed", "zero3", **variables)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "DeepSpeed's deepspeed_shm_comm does not build: " in done.stdout
    assert "fatal error: omp.h: No such file or directory" in done.stdout
    assert "This run would end with status 1." in done.stdout
    for title in ("Configuration", "Data", "This host", "Errors"):
        assert f"\n{title}\n" in done.stdout


@pytest.mark.slow
def test_where_the_command_is_typed_on_every_host_no_other_host_is_asked(named, tmp_path):
    (tmp_path / "hostfile").write_text("nowhere0 slots=1\nnowhere1 slots=1\n")
    place = ("--no_ssh", "--node_rank=1", "--master_addr=nowhere0")
    done = doctor(f"--hostfile={tmp_path / 'hostfile'}", *place, *named, "--deepspeed", "zero2", "--json")
    found = found_by(done)
    assert found["findings"] == [] and found["configuration"]["world_size"] == 2
    assert list(found["operators"]) == ["nowhere1"] and "network" not in found


def test_help_says_what_it_does():
    done = doctor("--help")
    assert done.returncode == 0 and "--rehearse" in done.stdout and "--write_env" in done.stdout
