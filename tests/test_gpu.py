"""On one real GPU: NCCL, bf16, flash attention or SDPA, fused AdamW; the losses are those of the CPU within bf16."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from test_story import DEEPSPEED, LIMIT_SECONDS

pytestmark = pytest.mark.gpu
SHORT = (
    "--max_steps 4 --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1 --save_strategy no".split()
)


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


@pytest.fixture
def train(tiny_model, conversation_file, tmp_path):
    if not has_gpu():
        pytest.skip("nvidia-smi finds no GPU here")

    def run(name: str, *flags: str) -> Path:
        output = tmp_path / name
        named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output]
        done = subprocess.run(
            [DEEPSPEED, "--num_gpus", "1", "finetune/finetune.py", *map(str, named), *SHORT, *flags],
            cwd=ROOT, env=OUTER_ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "GPU, nccl" in done.stdout
        return output

    return run


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("adapter", [(), ("--use_lora", "True", "--lora_dropout", "0")], ids=["full", "lora"])
def test_bf16_follows_float32(train, stage, adapter):
    exact = losses(train("float32", "--deepspeed", stage, *adapter))
    half = losses(train("bf16", "--deepspeed", stage, *adapter, "--bf16", "True", "--tf32", "True"))
    fused = losses(train("fused", "--deepspeed", stage, *adapter, "--bf16", "True", "--optim", "adamw_torch_fused"))
    assert len(exact) == 4 and exact[-1] < exact[0]
    assert half == pytest.approx(exact, abs=0.05)
    assert fused == pytest.approx(half, abs=0.05)
