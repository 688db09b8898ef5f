"""`finetune launch`: the status it ends with, what it hides and refuses."""

import socket

import pytest

from finetune.cli.launch import without_secrets
from finetune.diagnostics import Failure
from finetune.launcher import Resources, parse_launcher_args, resolve_resources
from finetune.launcher.local_session import HostReport
from finetune.launcher.ssh import shared_words
from finetune.launcher.supervisor import SupervisedRun
from finetune.utils.errors import ConfigError

SCRIPT = parse_launcher_args(["x.py"])
HOSTS = Resources("hosts", {"a": 1, "b": 1}, {"a": [0], "b": [0]})


def reports(*, status: int = 0, statuses: list | None = None, failure: Failure | None = None) -> list[HostReport]:
    return [HostReport("a", 0, [0]), HostReport("b", status, [0] if statuses is None else statuses, failure)]


@pytest.mark.parametrize(
    ("given", "signals", "expected"),
    [
        ({}, [], 0),
        ({"statuses": []}, [], 1),  # deepspeed says 0 when its launcher was killed
        ({"status": 247, "statuses": []}, [], 247),
        ({"status": 75, "statuses": [75]}, [15], 75),
        ({"status": 75, "statuses": []}, [15, 15], 143),
        ({"status": 3, "statuses": [], "failure": Failure("error", "no row", status=3, rank=1, host="b")}, [], 3),
        ({"status": 137, "statuses": [], "failure": Failure("died", "gone", rank=1, host="b")}, [], 137),
        ({"failure": Failure("launcher", "launch.py has died", host="b")}, [], 1),
    ],
)
def test_the_exit_status_is_that_of_what_failed_first(given, signals, expected, tmp_path):
    run = SupervisedRun(SCRIPT, HOSTS, output_dir=tmp_path, signals=signals)
    status, failure = run.outcome(reports(**given))
    assert status == expected
    assert (failure is None) == (expected in (0, 75, 143))


@pytest.mark.parametrize(("phase", "pages"), [("data", 0), ("model", 0), ("step", 1)])
def test_an_error_before_the_first_step_is_said_once_by_its_rank(phase, pages, capsys):
    SupervisedRun(SCRIPT).report_failure(Failure("error", "no such layer", phase=phase, rank=0))
    SupervisedRun(SCRIPT).report_failure(Failure("exception", "ValueError: 1", phase=phase, rank=0))
    said = capsys.readouterr().err
    assert said.count("no such layer") == pages and said.count("ValueError: 1") == 1


def test_a_script_that_is_not_ours_is_believed():
    assert SupervisedRun(SCRIPT, HOSTS).outcome(reports(statuses=[])) == (0, None)


def test_a_token_leaves_the_command_line():
    words = ["--a", "1", "--hub_token", "hf_x", "--hub_token=hf_y", "--b"]
    assert without_secrets(words) == (["--a", "1", "--b"], {"HF_TOKEN": "hf_y"})


def test_what_a_run_writes_is_not_compared_between_hosts():
    words = "--data_path a b --output_dir out --deepspeed=zero3 --resume_from_checkpoint c --model_name_or_path m"
    assert shared_words(words.split()) == ["a", "b", "zero3", "m"]


@pytest.mark.parametrize("word", ["--launcher=slurm", "--launcher_args=-S"])
def test_another_way_to_hosts_is_refused(tmp_path, word):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    flags = parse_launcher_args([f"--hostfile={tmp_path / 'hosts'}", word, "x.py"])
    with pytest.raises(ConfigError, match=f"{word.replace('=', ' ')}: this command reaches hosts over ssh"):
        SupervisedRun(flags, resolve_resources(flags)).start()


@pytest.mark.parametrize("words", [[], ["--no_ssh", "--node_rank=0"]])
def test_a_port_that_is_taken_is_named_before_deepspeed_starts(words):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--master_port {port} is taken: leave the flag out"):
            SupervisedRun(parse_launcher_args([f"--master_port={port}", *words, "x.py"])).start()
