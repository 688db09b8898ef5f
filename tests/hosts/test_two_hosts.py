"""The main command over a hostfile: two real hosts of one rank each, the real launcher, ssh and pdsh between them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune import checkpoint
from tests.helpers import hosts, ranks
from tests.helpers.host_runs import ENVIRONMENT, SECONDS_TO_END, left_behind
from tests.helpers.paths import ROOT
from tests.helpers.short_runs import LORA, losses

pytestmark = pytest.mark.hosts

DEEPSPEED = Path(sys.executable).parent / "deepspeed"
LIMIT_SECONDS = 240
SHORT = (
    "--num_train_epochs 2 --per_device_train_batch_size 1 --learning_rate 1e-2 --lr_scheduler_type constant "
    "--logging_steps 1 --save_strategy epoch --write_report False"
).split()

Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def launch(nodes: list[hosts.Host], tmp_path: Path) -> Iterator[Launch]:
    """Type the main command on the first host, in a folder that holds the hostfile and the launcher's environment."""
    (tmp_path / "hostfile").write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    (tmp_path / ".deepspeed_env").write_text(ENVIRONMENT)
    first = nodes[0]

    def run(*flags: str | Path) -> subprocess.CompletedProcess:
        environment = ("env", "DS_ACCELERATOR=cpu", f"PDSH_SSH_ARGS_APPEND=-F {first.folder / 'ssh_config'}")
        launcher = (DEEPSPEED, "--hostfile=hostfile", "--no_ssh_check", "--master_addr", first.address)
        command = first.command([*environment, *launcher, ROOT / "finetune/finetune.py", *flags], tmp_path)
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)

    yield run
    for node in nodes:
        node.end_processes()


def test_a_host_has_its_own_name_processes_and_network(nodes):
    for node in nodes:
        words = ("sh", "-c", "hostname; cat /proc/1/comm; echo /dev/shm/*; hostname -I")
        done = subprocess.run(node.command(words, Path("/")), capture_output=True, text=True, timeout=LIMIT_SECONDS)
        assert done.stdout.split() == [node.name, "sshd", "/dev/shm/*", node.address], done.stderr
    assert left_behind(nodes) == []
    sleeping = subprocess.Popen(nodes[1].command(["sleep", "60"], Path("/")))
    deadline = time.monotonic() + SECONDS_TO_END
    while "sleep 60" not in nodes[1].processes().values() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "sleep 60" in nodes[1].processes().values()  # so that "nothing left behind" says something
    assert nodes[0].processes() == {}
    nodes[1].end_processes()
    assert sleeping.wait(SECONDS_TO_END) != 0


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--deepspeed", "zero2", *LORA), id="lora-zero2", marks=pytest.mark.faults),
        pytest.param(("--deepspeed", "zero3"), id="full-zero3"),
    ],
)
def test_two_hosts_give_the_losses_of_two_ranks_on_one(nodes, launch, tmp_path, tiny_model, conversation_file, flags):
    named = ("--model_name_or_path", tiny_model, "--data_path", conversation_file, *SHORT, *flags)
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = ranks.train(tmp_path / "logs", [*named, "--output_dir", one])
    assert outcome.succeeded, "\n".join(outcome.outputs)

    done = launch(*named, "--output_dir", two)

    assert done.returncode == 0, done.stdout + done.stderr
    assert left_behind(nodes) == []
    assert len(losses(one)) == 6
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    ran = json.loads((two / "run.json").read_text())
    assert (ran["world_size"], ran["completed"]) == (2, True)
    for node in nodes:  # a rank of each, and not two of one
        assert f"{node.name}: " in done.stdout


def test_a_bad_flag_ends_both_hosts_with_its_status_and_says_why(
    nodes, launch, tmp_path, tiny_model, conversation_file
):
    named = ("--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "output")

    done = launch(*named, *SHORT, "--deepspeed", "zero2", "--learning_rat", "1")

    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "error: unknown flag --learning_rat: did you mean --learning_rate?" in said
    assert "Traceback" not in said
    assert left_behind(nodes) == []
    assert not (tmp_path / "output").exists()


def test_without_a_shared_disk_each_host_keeps_its_part_and_says_what_it_lacks(
    nodes, launch, tmp_path, tiny_model, conversation_file
):
    private = tmp_path / "private"
    private.mkdir()

    def on(node: hosts.Host, *words: object) -> str:
        done = subprocess.run(node.command(words, Path("/")), capture_output=True, text=True, timeout=LIMIT_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for node in nodes:
        on(node, "mount", "-t", "tmpfs", "tmpfs", private)
    output = private / "output"
    named = ("--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output)
    flags = (*named, *SHORT, "--deepspeed", "zero3", "--save_strategy", "steps", "--save_steps", "2")
    weights = (nodes[0], "sha256sum", output / "model.safetensors")
    done = launch(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each of 2 hosts keeps the checkpoints of its own ranks" in done.stdout
    whole = on(*weights)
    for rank, node in enumerate(nodes):
        files = set(on(node, "find", output / "checkpoint-4", "-type", "f", "-printf", "%f\n").split())
        assert {"manifest.json", "latest", f"rng_state_{rank}.pth"} <= files
        assert f"rng_state_{1 - rank}.pth" not in files

    done = launch(*flags, "--resume_from_checkpoint", output / "checkpoint-4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout and on(*weights) == whole

    merged = tmp_path / "merged"  # both see it
    for node in nodes:
        on(node, "cp", "-r", f"{output}/checkpoint-4/.", merged)
    assert checkpoint.verify_checkpoint(merged) == []
    alone = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "alone"]
    fewer = ("--resume_from_checkpoint", merged, "--resume_world_size", "any", "--use_cpu", "True")
    outcome = ranks.train(tmp_path / "logs", [*alone, *SHORT, "--deepspeed", "zero3", *fewer], world_size=1)
    assert outcome.succeeded and "on 1 ranks instead of 2" in outcome.outputs[0], outcome.outputs[0]

    (shard,) = on(nodes[1], "find", output / "checkpoint-4", "-name", "*optim_states.pt").split()
    on(nodes[1], "rm", shard)
    done = launch(*flags, "--resume_from_checkpoint", output / "checkpoint-4")
    said = done.stdout + done.stderr
    assert done.returncode == 4, said
    assert f"{shard} is missing (on node1)" in said and "Traceback" not in said
    assert left_behind(nodes) == []
    for node in nodes:
        on(node, "umount", private)
