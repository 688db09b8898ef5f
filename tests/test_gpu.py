"""On one real GPU: NCCL, bf16, attention over flat rows by the kernels there, fused AdamW, losses within bf16."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("precision", [(), ("--bf16", "True")], ids=["float32", "bf16"])
def test_flat_rows_learn_what_padded_ones_do(train, precision):
    flags = ("--deepspeed", "zero2", *precision)
    padded = losses(train("padded", *flags, "--batching", "padded"))
    assert losses(train("flat", *flags)) == pytest.approx(padded, abs=0.05 if precision else 1e-4)
    assert losses(train("checkpointed", *flags, "--gradient_checkpointing", "True")) == pytest.approx(
        padded, abs=0.05 if precision else 1e-4
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_kernel_for_flat_rows_computes_what_one_conversation_at_a_time_does(window, key_heads):
    if not has_gpu():
        pytest.skip("nvidia-smi finds no GPU here")
    done = subprocess.run(
        [sys.executable, "-c", KERNEL_AGAINST_SDPA, str(window or 0), str(key_heads)],
        cwd=ROOT, env=OUTER_ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


KERNEL_AGAINST_SDPA = """
import sys
import torch
from finetune import attention

window, key_heads = int(sys.argv[1]) or None, int(sys.argv[2])
lengths = [70, 1, 33, 200]
boundaries = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
shapes = [(1, heads, sum(lengths), 64) for heads in (4, key_heads, key_heads)]
found = []
for takes_kernel in (True, False):
    torch.manual_seed(0)
    parts = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    if takes_kernel:
        assert attention._kernel_takes(*parts), "a GPU older than Ampere has no such kernel"
    else:
        attention._kernel_takes = lambda *_: False
    output, _ = attention.flat_attention(
        None, *parts, None, sliding_window=window, segment_lengths=lengths, cu_seq_lens_q=boundaries, max_length_q=200
    )
    output.float().square().sum().backward()
    found.append([output, *(part.grad for part in parts)])
for mine, other in zip(*found):
    assert torch.allclose(mine.float(), other.float(), atol=0.05, rtol=0.05), (mine - other).abs().max()
"""
