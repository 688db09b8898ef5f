"""`finetune train` over a hostfile: two real hosts, real ssh; a rank, a launcher, a host or a network that goes."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.host_runs import ENVIRONMENT, find, left_behind, until
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS, write_rows
from tests.helpers.short_runs import losses

pytestmark = pytest.mark.hosts

FINETUNE = ROOT / ".venv/bin/finetune"
LIMIT_SECONDS = 150
SECRET = "hf_verysecretvalue"
FLAGS = "--num_train_epochs 2000 --logging_steps 1 --save_strategy no --deepspeed zero2".split()

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(nodes, tmp_path, tiny_model) -> Iterator[Start]:
    """Type the command on the first host; the working directory has the hostfile and the environment."""
    (tmp_path / "hostfile").write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    (tmp_path / ".deepspeed_env").write_text(f"# comments are allowed\n\n{ENVIRONMENT}HF_TOKEN={SECRET}\n")
    (tmp_path / ".deepspeed_env").chmod(0o600)
    (tmp_path / "data dir").mkdir()
    write_rows(tmp_path / "data dir/rows.json", ROWS)
    first = nodes[0]
    started = []

    def run(*flags: str | Path, launcher: tuple[str, ...] = ("--hostfile=hostfile",)) -> subprocess.Popen:
        named = ("--model_name_or_path", tiny_model, "--data_path", "data dir/rows.json", "--output_dir", "output")
        environment = ["env", "DS_ACCELERATOR=cpu", f"PDSH_SSH_ARGS_APPEND=-F {first.folder / 'ssh_config'}"]
        environment.append(f"PYTHONPATH={ROOT}")  # this clone, whichever is installed
        words = (FINETUNE, "launch", *launcher, ROOT / "finetune/finetune.py", *named, *flags)
        started.append(
            subprocess.Popen(
                first.command([*environment, *words], tmp_path),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
        return started[-1]

    yield run
    for one in started:
        one.kill()
        one.communicate()
    for node in nodes:
        node.end_processes()


def test_two_hosts_train_with_arguments_as_they_are_and_no_secret_is_seen(start, nodes, tmp_path):
    odd = 'it\'s $(touch X); "q" 你好 `id` %h'
    run = start("--deepspeed", "zero2", "--max_steps", "12", "--logging_steps", "1", "--save_strategy", "no",
                "--run_name", odd)  # fmt: skip
    said = until(run, "step 3/")
    lines = [line for node in nodes for line in node.processes().values()]
    rest, _ = run.communicate(timeout=LIMIT_SECONDS)
    said += rest
    assert run.returncode == 0, said
    assert left_behind(nodes) == [] and len(losses(tmp_path / "output")) == 12
    ran = json.loads((tmp_path / "output/run.json").read_text())
    assert (ran["world_size"], ran["arguments"]["run_name"]) == (2, odd)
    assert (tmp_path / "output/RUN_COMPLETE").is_file() and not (tmp_path / "X").exists()
    assert "node0: " in said and "launch: 2 hosts, 2 ranks, rendezvous at 10.77.0.10:" in said
    assert any("deepspeed.launcher.launch" in line for line in lines)
    seen = "\n".join([said, *lines, *(path.read_text(errors="replace") for path in tmp_path.rglob("output/*.json*"))])
    assert SECRET not in seen


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("--local_rank=0", marks=pytest.mark.faults),
        pytest.param("deepspeed.launcher.launch", marks=pytest.mark.faults),
        "import agent",
    ],
)
def test_what_dies_on_the_second_host_ends_the_first_and_nothing_else(start, nodes, tmp_path, victim):
    bystander = subprocess.Popen(nodes[0].command(["sleep", "300"], Path("/")))
    run = start(*FLAGS)
    until(run, "step 5/")
    began = time.monotonic()

    os.kill(find(nodes[1], victim), signal.SIGKILL)
    said, _ = run.communicate(timeout=LIMIT_SECONDS)

    assert run.returncode not in (0, 75), said
    assert time.monotonic() - began < 30
    page = said[said.index("The run failed") :]
    assert "node1" in page and "Traceback" not in page
    assert json.loads((tmp_path / "output/failure.json").read_text())["host"] == "node1"
    assert [line for line in left_behind([nodes[1]])] == []
    assert [line for line in nodes[0].processes().values() if "sleep 300" not in line and "sshd" not in line] == []
    assert any("sleep 300" in line for line in nodes[0].processes().values())
    bystander.kill()
    bystander.wait()
    nodes[0].end_processes()


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_rank_that_is_stopped_is_found_and_named(start, nodes, tmp_path, number):
    run = start(*FLAGS, "--step_timeout", "8")
    until(run, "step 5/")
    began = time.monotonic()
    os.kill(find(nodes[number], "--local_rank=0"), signal.SIGSTOP)
    said, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode not in (0, 75) and time.monotonic() - began < 25
    assert f"rank {number} on node{number} is stopped" in said
    assert "stacks of rank" in said and "most recent call first" in said
    assert left_behind(nodes) == []


@pytest.mark.faults
def test_a_host_whose_network_goes_is_lost_and_its_ranks_end_too(start, nodes, tmp_path):
    run = start(*FLAGS, "--step_timeout", "60")
    until(run, "step 5/")
    ip = ["ip", "-n", nodes[1].namespace, "link", "set", "eth0"]
    subprocess.run([*ip, "down"], check=True)
    try:
        said, _ = run.communicate(timeout=LIMIT_SECONDS)
        assert run.returncode not in (0, 75), said
        assert "node1" in said[said.index("The run failed") :]
        deadline = time.monotonic() + 60
        while nodes[1].processes() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert [line for line in nodes[1].processes().values() if "finetune" in line] == []
    finally:
        subprocess.run([*ip, "up"], check=True)


def test_a_request_to_stop_reaches_the_ranks_of_all_hosts(start, nodes, tmp_path):
    run = start(*FLAGS)
    until(run, "step 5/")
    os.kill(find(nodes[0], "finetune train"), signal.SIGTERM)
    said, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 75, said
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    assert checkpoint.name in said and (checkpoint / "manifest.json").is_file()
    assert left_behind(nodes) == []


def test_a_launch_that_is_killed_takes_everything_with_it(start, nodes):
    run = start(*FLAGS)
    until(run, "step 5/")
    os.kill(find(nodes[0], "finetune train"), signal.SIGKILL)
    run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode != 0
    assert left_behind(nodes) == []


def test_a_hostfile_that_leaves_one_other_host_trains_there(start, nodes, tmp_path):
    run = start("--deepspeed", "zero2", "--max_steps", "40", "--logging_steps", "1", "--save_strategy", "no",
                launcher=("--hostfile=hostfile", "--include=node1"))  # fmt: skip
    until(run, "step 2/")
    assert find(nodes[1], "--local_rank=0")
    said, _ = run.communicate(timeout=LIMIT_SECONDS)
    assert run.returncode == 0, said
    assert json.loads((tmp_path / "output/run.json").read_text())["world_size"] == 1
