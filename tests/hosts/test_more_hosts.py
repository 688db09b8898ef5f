"""Three hosts, and four: the losses of as many ranks on one host, saved, gone on from, opened with plain libraries."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import hosts, ranks
from tests.helpers.host_runs import Cluster, cluster
from tests.helpers.short_runs import LORA, losses

pytestmark = pytest.mark.hosts

FLAGS = (
    "--num_train_epochs 3 --per_device_train_batch_size 1 --learning_rate 1e-2 --lr_scheduler_type constant "
    "--logging_steps 1 --save_strategy steps --save_steps 3 --write_report False"
).split()
STEPS = 6


@pytest.fixture
def job(three_nodes, tmp_path, tiny_model) -> Iterator[Cluster]:
    with cluster(three_nodes, tmp_path, tiny_model) as made:
        yield made


def on_one_host(job: Cluster, *flags: str, world_size: int = 3) -> list[float]:
    """The losses of the same job with all its ranks on this machine."""
    alone = job.folder / "alone"
    named = ["--model_name_or_path", job.model, "--data_path", job.data, "--output_dir", alone]
    outcome = ranks.train(job.folder / "logs", [*named, *FLAGS, *flags], world_size)
    assert outcome.succeeded, "\n".join(outcome.outputs)
    return losses(alone)


def weights(output: Path) -> str:
    """Of all that was saved as the result."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(output.glob("*.safetensors")))).hexdigest()


def opened(output: Path, *, is_adapter: bool) -> int:
    """Parameters of the result, loaded with what any reader has."""
    if is_adapter:
        from peft import AutoPeftModelForCausalLM as Loader
    else:
        from transformers import AutoModelForCausalLM as Loader
    return sum(one.numel() for one in Loader.from_pretrained(output).parameters())


@pytest.mark.parametrize(
    ("flags", "is_bare"),
    [
        pytest.param(("--deepspeed", "zero2"), False, id="full-zero2"),
        pytest.param(("--deepspeed", "zero3", *LORA), True, id="lora-zero3-bare", marks=pytest.mark.faults),
        pytest.param(("--deepspeed", "zero3"), True, id="full-zero3-bare", marks=pytest.mark.faults),
        pytest.param(("--deepspeed", "zero2", *LORA), False, id="lora-zero2", marks=pytest.mark.faults),
    ],
)
def test_three_hosts_give_the_losses_of_three_ranks_on_one_and_go_on_to_the_last_bit(job, flags, is_bare):
    start = job.start_deepspeed if is_bare else job.start
    expected = on_one_host(job, *flags)

    job.completed(start(*FLAGS, *flags))

    assert len(expected) == STEPS and losses(job.output) == pytest.approx(expected, abs=1e-5)
    ran = json.loads((job.output / "run.json").read_text())
    assert (ran["world_size"], ran["completed"]) == (3, True)
    whole = weights(job.output)
    assert opened(job.output, is_adapter=LORA[0] in flags) > 3_000_000

    said = job.completed(start(*FLAGS, *flags, "--resume_from_checkpoint", job.output / "checkpoint-3"))

    assert "step 3" in said[said.index("resuming from") :] and weights(job.output) == whole
    assert losses(job.output) == pytest.approx(expected, abs=1e-5)


@pytest.mark.faults
def test_four_hosts_with_more_slots_than_are_used_and_little_shared_memory_on_one(tmp_path, tiny_model):
    hosts.require()
    (tmp_path / "hosts").mkdir()
    (tmp_path / "job").mkdir()
    with hosts.running(4, tmp_path / "hosts") as nodes, cluster(nodes, tmp_path / "job", tiny_model) as job:
        job.write_hostfile(*(f"{node.name} slots=4" for node in nodes))
        with nodes[3].disk(Path("/dev/shm"), "64k"):
            said = job.completed(job.start(*FLAGS, "--deepspeed", "zero2", launcher=("--num_gpus=1",)))
        assert "launch: 4 hosts, 4 ranks" in said
        assert losses(job.output) == pytest.approx(on_one_host(job, "--deepspeed", "zero2", world_size=4), abs=1e-5)
