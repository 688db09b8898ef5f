"""Optimizers beside AdamW: what a resumed run does, and how large their states are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import train as main
from finetune.export.model_merge import merge_weights, plan_merge
from finetune.inference.run_result import read_result
from finetune.training.flag_checks import optimizer_state_bytes
from tests.helpers import ranks, runs
from tests.helpers.short_runs import SHORT, losses
from tests.helpers.tiny_models import build

SAVING = ("--save_strategy", "steps", "--save_steps", "3")


def train_without_compiling(argv: list[str]) -> None:
    """On a CPU Muon's compilation would take most of the time."""
    torch.compiler.set_stance("force_eager")
    main.main(argv)


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, conversation_file: Path):
    def start(name: str, *flags: str, world_size: int = 2, model: Path = tiny_model) -> Path:
        output = tmp_path / name
        named = ["--model_name_or_path", model, "--data_path", conversation_file, "--output_dir", output]
        argv = [str(word) for word in (*named, *SHORT, *SAVING, *flags)]
        outcome = ranks.run(tmp_path / f"{name}-logs", train_without_compiling, (argv,), world_size)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        return output

    return start


@pytest.mark.slow  # DeepSpeed compiles FusedAdam first
def test_muon_resumes_with_the_weights_of_all_experts_in_one(run, tmp_path, tiny_model):
    folder = tmp_path / "mixtral"
    shutil.copytree(tiny_model, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    build("mixtral", vocab_size=vocabulary, max_position_embeddings=512).save_pretrained(folder)
    flags = ("--deepspeed", "zero2_muon", "--save_total_limit", "9")
    whole = run("whole", *flags, world_size=1, model=folder)
    resume = ("--resume_from_checkpoint", str(whole / "checkpoint-3"))
    resumed = run("resumed", *flags, *resume, world_size=1, model=folder)
    assert losses(resumed) == losses(whole)[3:]
    assert runs.result_of(resumed)[0] == runs.result_of(whole)[0]


@pytest.mark.slow  # DeepSpeed compiles FusedAdam first
def test_muon_trains_resumes_and_merges_under_both_stages(run, tmp_path):
    whole = {stage: run(stage, "--deepspeed", stage) for stage in ("zero2_muon", "zero3_muon")}
    assert losses(whole["zero3_muon"]) == pytest.approx(losses(whole["zero2_muon"]), abs=1e-4)
    assert losses(whole["zero2_muon"])[-1] < losses(whole["zero2_muon"])[0] - 1
    for stage, output in whole.items():
        folder = output / "checkpoint-3"
        resumed = run(f"{stage}-resumed", "--deepspeed", stage, "--resume_from_checkpoint", str(folder))
        assert losses(resumed) == losses(output)[3:], stage
        merged = plan_merge(read_result(folder), tmp_path / f"{stage}-merged", base_name=None, dtype="float32")
        merge_weights(merged, shard_bytes=1 << 30)
        saved, weights = (load_file(each / "model.safetensors") for each in (folder, tmp_path / f"{stage}-merged"))
        assert len(weights) > 10 and all(torch.equal(saved[name], weights[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "config"),
    [("adamw_8bit", ""), ("adamw_8bit", "zero2"), ("lion_8bit", "zero2"), ("adafactor", ""), ("adafactor", "zero2"),
     ("paged_adamw_8bit", "zero2"), ("lion_32bit", "")],
)  # fmt: skip
def test_a_resumed_run_ends_in_the_same_bits(run, optim, config):
    groups = ("--embedding_learning_rate", "3e-4", "--freeze", "layers.0")
    flags = ("--optim", optim, "--learning_rate", "1e-3", *groups, *(("--deepspeed", config) if config else ()))
    whole = run("whole", *flags)
    resumed = run("resumed", *flags, "--resume_from_checkpoint", str(whole / "checkpoint-3"))
    assert losses(resumed) == losses(whole)[3:]
    assert set(losses(whole, "learning_rate")) == {1e-3}  # not that of the embeddings, which are the first group
    assert runs.result_of(resumed)[0] == runs.result_of(whole)[0]


@pytest.mark.parametrize(
    ("optim", "whole", "flat"),
    [("adamw_torch", 8, 8), ("adamw_8bit", 2.05, 2.05), ("lion_8bit", 1.03, 1.03), ("lion_32bit", 4, 4),
     ("adafactor", 0.02, 4), ("sgd", 0, 0), ("ademamix", 12, 12)],
)  # fmt: skip
def test_the_bytes_of_states_are_measured(optim, whole, flat, tmp_path):
    values = {"output_dir": str(tmp_path), "optim": optim, "report_to": []}
    assert optimizer_state_bytes(values, partitions=False) == pytest.approx(whole, abs=0.02)
    assert optimizer_state_bytes(values, partitions=True) == pytest.approx(flat, abs=0.02)
