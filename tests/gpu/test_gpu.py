"""On one real GPU: NCCL, bf16 and fp16, attention over flat rows by the kernels there, the fused AdamW, Liger's
kernels, and a run under ZeRO-3 that goes on from its checkpoint. What is learned is compared, by the loss."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.environment import OUTER_ENVIRONMENT
from tests.helpers.paths import ROOT
from tests.helpers.published_command import DEEPSPEED, LIMIT_SECONDS

pytestmark = pytest.mark.gpu
SHORT = (
    "--max_steps 4 --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1 --save_strategy no "
    "--write_report False"
).split()
# As a user's, but that prepared data does not lie among a user's.
ENVIRONMENT = {**OUTER_ENVIRONMENT, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
BF16 = ("--bf16", "True", "--tf32", "True")
LORA = ("--use_lora", "True", "--lora_dropout", "0")
IN_HALF_PRECISION = 0.05  # of losses of about 10: what 8 bits of a mantissa leave


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    found = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    if not found or "GPU" not in found:
        pytest.skip("nvidia-smi finds no GPU here")


@pytest.fixture(scope="module")
def train(tiny_model, conversation_file, tmp_path_factory) -> Callable[..., Path]:
    """The output folder of a run with these flags; the same flags are run once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*flags: str | Path, output: Path | None = None) -> Path:
        words = tuple(map(str, flags))
        if words in made:
            return made[words]
        output = output or tmp_path_factory.mktemp("run") / "output"
        named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output]
        done = subprocess.run(
            [DEEPSPEED, "--num_gpus", "1", "finetune/finetune.py", *map(str, named), *SHORT, *words],
            cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "GPU, nccl" in done.stdout
        made[words] = output
        return output

    return run


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def plan_of(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())["plan"]


@pytest.mark.parametrize("flags", [("zero2",), ("zero3", *LORA)], ids=["zero2-full", "zero3-lora"])
def test_bf16_follows_float32(train, flags):
    exact = losses(train("--deepspeed", *flags))
    half = train("--deepspeed", *flags, *BF16)
    assert len(exact) == 4 and exact[-1] < exact[0]
    assert losses(half) == pytest.approx(exact, abs=IN_HALF_PRECISION)
    assert plan_of(half)["precision"] == "bf16"


def test_the_fused_optimizer_learns_what_the_plain_one_does(train):
    plain, fused = (train("--deepspeed", "zero2", "--optim", name) for name in ("adamw_torch", "adamw_torch_fused"))
    assert losses(fused) == pytest.approx(losses(plain), abs=1e-3)


def test_a_lone_rank_without_deepspeed_learns_what_it_does_with_it(train):
    alone, zero = (train(*config, "--optim", "adamw_torch") for config in ((), ("--deepspeed", "zero2")))
    assert losses(alone) == pytest.approx(losses(zero), abs=1e-3)


def test_fp16_learns_with_a_scaled_loss(train):
    found = losses(train("--deepspeed", "zero1", "--fp16", "True", "--max_steps", "10"))
    exact = losses(train("--deepspeed", "zero2"))
    assert len(found) == 10 and all(map(math.isfinite, found))
    assert found[0] == pytest.approx(exact[0], abs=IN_HALF_PRECISION)
    assert found[-1] < found[0]  # the first steps may search for the scale


def test_flat_rows_learn_what_padded_ones_do(train):
    flat = train("--deepspeed", "zero2", *BF16)
    padded = train("--deepspeed", "zero2", *BF16, "--batching", "padded")
    checkpointed = train("--deepspeed", "zero2", *BF16, "--gradient_checkpointing", "True")
    kernel = "flash_attention_2" if find_spec("flash_attn") else "flat_attention"
    assert [plan_of(one)["attention"] for one in (flat, checkpointed)] == [kernel, kernel]
    assert (plan_of(flat)["batching"], plan_of(padded)["batching"]) == ("flat", "padded")
    assert losses(flat) == pytest.approx(losses(padded), abs=IN_HALF_PRECISION)
    assert losses(checkpointed) == pytest.approx(losses(padded), abs=IN_HALF_PRECISION)


def test_a_run_under_zero3_goes_on_from_its_checkpoint(train):
    flags = ("--deepspeed", "zero3", *BF16, "--save_strategy", "steps", "--save_steps", "2")
    output = train(*flags)
    whole = losses(output)
    assert train(*flags, "--resume_from_checkpoint", output / "checkpoint-2", output=output) == output
    again = losses(output)
    assert len(whole) == len(again) == 4 and again[:2] == whole[:2]
    assert again[2:] == pytest.approx(whole[2:], abs=1e-3)  # sums on a GPU have no fixed order
    assert json.loads((output / "run.json").read_text())["resumed"][0]["step"] == 2


def test_ligers_kernels_learn_what_the_models_own_code_does(train):
    if find_spec("liger_kernel") is None:
        pytest.skip("pip install liger-kernel, which needs a GPU, to try it")
    own = losses(train("--deepspeed", "zero2", *BF16))
    theirs = losses(train("--deepspeed", "zero2", *BF16, "--use_liger_kernel", "True"))
    assert theirs == pytest.approx(own, abs=IN_HALF_PRECISION)


def test_the_kernel_for_flat_rows_computes_what_one_conversation_at_a_time_does():
    done = subprocess.run(
        [sys.executable, "-c", KERNEL_AGAINST_SDPA],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["compared"] * 8


KERNEL_AGAINST_SDPA = """
from itertools import product
import torch
from finetune import attention

lengths = [70, 1, 33, 200]
boundaries = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
takes = attention._kernel_takes
for window, key_heads, dtype in product((None, 5), (4, 2), (torch.bfloat16, torch.float16)):
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, key_heads, key_heads)]
    found = []
    for takes_kernel in (True, False):
        torch.manual_seed(0)
        parts = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        assert takes(*parts), "a GPU older than Ampere has no such kernel"
        attention._kernel_takes = takes if takes_kernel else lambda *_: False
        output, _ = attention.flat_attention(
            None, *parts, None,
            sliding_window=window, segment_lengths=lengths, cu_seq_lens_q=boundaries, max_length_q=max(lengths),
        )
        output.float().square().sum().backward()
        found.append([output, *(part.grad for part in parts)])
    for mine, other in zip(*found, strict=True):
        assert torch.isfinite(mine).all() and mine.abs().max() > 0
        assert torch.allclose(mine.float(), other.float(), atol=0.05, rtol=0.05), (mine - other).abs().max()
    print("compared")
"""
