"""On one real GPU: NCCL, bf16 and fp16, kernels for flat rows, offload, 4 bits; what is saved is measured and answers.

All runs start when the first test asks for one, four at a time: together they take less than five minutes.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.environment import OUTER_ENVIRONMENT
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.gpu
LIMIT_SECONDS = 240
# As a user's, but that prepared data does not lie among a user's.
ENVIRONMENT = {**OUTER_ENVIRONMENT, "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], "HF_HUB_OFFLINE": "1"}
SHORT = (
    "--max_steps 4 --per_device_train_batch_size 2 --learning_rate 1e-3 --logging_steps 1 --save_strategy no "
    "--write_report False"
)
LORA = "--use_lora True --lora_dropout 0"
SAVING = "--save_strategy steps --save_steps 2"
RUNS = {  # those that take longest first
    "offload": "--deepspeed zero2_offload",
    "zero3": f"--deepspeed zero3 --gradient_checkpointing True {SAVING}",
    "zero2": "--deepspeed zero2",
    "float32": "--deepspeed zero2 --bf16 False",
    "padded": "--deepspeed zero2 --batching padded",
    "zero3 lora": f"--deepspeed zero3 {LORA}",
    "lora": LORA,
    "qlora": f"{LORA} --load_in_4bit True",
    "full": "",
    "fp16": "--deepspeed zero1 --fp16 True --max_steps 10",
    "liger": "--deepspeed zero2 --use_liger_kernel True",
}
NEEDS = {"qlora": "bitsandbytes", "liger": "liger_kernel"}  # without it a run says how to install it
IN_HALF_PRECISION = 0.05  # of losses of about 10: what 8 bits of a mantissa leave


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    found = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    assert found and "GPU" in found, "nvidia-smi finds no GPU here"


def call(*words: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_SECONDS, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def start(tiny_model, conversation_file) -> Callable[..., subprocess.CompletedProcess]:
    """Train with these flags in this folder."""

    def train(output: Path, flags: str) -> subprocess.CompletedProcess:
        named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output]
        return call("finetune/finetune.py", *named, *SHORT.split(), *flags.split())

    return train


@pytest.fixture(scope="module")
def train(start, tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """The output folder of a run of `RUNS`, which has ended well."""
    with ThreadPoolExecutor(4) as pool:
        outputs = {name: tmp_path_factory.mktemp("run") / "output" for name in RUNS}
        runs: dict[str, Future] = {name: pool.submit(start, outputs[name], flags) for name, flags in RUNS.items()}

        def result(name: str) -> Path:
            done = runs[name].result()
            assert done.returncode == 0, done.stdout + done.stderr
            assert "GPU, nccl" in done.stdout
            # The tensors are compared exactly, and the loss is that of the model in memory.
            assert re.search(r"are those in memory; loss over [\d,]+ tokens [\d.]+\s*\n", done.stdout), done.stdout
            return outputs[name]

        result.runs = runs
        yield result


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def plan_of(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())["plan"]


def test_the_kernel_for_flat_rows_computes_what_one_conversation_at_a_time_does():
    done = call("-c", KERNEL_AGAINST_SDPA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["compared"] * 12


def test_bf16_is_the_default_and_follows_float32(train):
    exact, half = train("float32"), train("zero2")
    assert len(losses(exact)) == 4 and losses(exact)[-1] < losses(exact)[0]
    assert losses(half) == pytest.approx(losses(exact), abs=IN_HALF_PRECISION)
    assert (plan_of(exact)["precision"], plan_of(half)["precision"]) == ("float32", "bf16")


def test_flat_rows_learn_what_padded_ones_do(train):
    flat, padded = train("zero2"), train("padded")
    kernel = "flash_attention" if any(find_spec(name) for name in ("flash_attn", "flash_attn_interface")) else "flat_"
    assert plan_of(flat)["attention"].startswith(kernel)
    assert (plan_of(flat)["batching"], plan_of(padded)["batching"]) == ("flat", "padded")
    assert losses(flat) == pytest.approx(losses(padded), abs=IN_HALF_PRECISION)


@pytest.mark.parametrize(
    ("name", "other"), [("offload", "zero2"), ("zero3", "zero2"), ("full", "zero2"), ("lora", "zero3 lora")]
)
def test_each_way_learns_what_another_does(train, name, other):
    """CPU Adam, ZeRO-3 with activation checkpointing, and no DeepSpeed, with all parameters and with LoRA."""
    assert losses(train(name)) == pytest.approx(losses(train(other)), abs=IN_HALF_PRECISION)


@pytest.mark.parametrize(
    ("name", "other", "tolerance"), [("qlora", "lora", 0.5), ("liger", "zero2", IN_HALF_PRECISION)]
)
def test_what_another_package_computes_is_near_or_the_package_is_named(train, name, other, tolerance):
    if find_spec(NEEDS[name]) is not None:
        assert losses(train(name)) == pytest.approx(losses(train(other)), abs=tolerance)
    else:
        done = train.runs[name].result()
        assert done.returncode == 2 and "pip install" in done.stderr


def test_fp16_learns_with_a_scaled_loss(train):
    found, exact = losses(train("fp16")), losses(train("float32"))
    assert len(found) == 10 and all(map(math.isfinite, found))
    assert found[0] == pytest.approx(exact[0], abs=IN_HALF_PRECISION)
    assert found[-1] < found[0]  # the first steps may search for the scale


def test_memory_is_logged_as_allocated_and_reserved(train):
    lines = [json.loads(line) for line in (train("zero2") / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["peak_memory_bytes"] <= line["peak_reserved_bytes"] for line in lines if "loss" in line)


def test_a_run_under_zero3_goes_on_from_its_checkpoint(train, start):
    output = train("zero3")
    whole = losses(output)
    done = start(output, f"{RUNS['zero3']} --resume_from_checkpoint {output / 'checkpoint-2'}")
    assert done.returncode == 0, done.stdout + done.stderr
    again = losses(output)
    assert len(whole) == len(again) == 4 and again[:2] == whole[:2]
    assert again[2:] == pytest.approx(whole[2:], abs=1e-3)  # sums on a GPU have no fixed order
    assert json.loads((output / "run.json").read_text())["resumed"][0]["step"] == 2


@pytest.mark.parametrize("name", ["zero2", "lora"])
def test_a_result_is_measured_and_answers(train, conversation_file, name):
    output = train(name)
    measured = call("-m", "finetune", "evaluate", output, "--data_path", conversation_file, "--json")
    assert measured.returncode == 0, measured.stderr
    assert "tuned" in measured.stdout
    answered = call("-m", "finetune", "chat", output, "--json", "--max_new_tokens", "4", input="Hello")
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)


KERNEL_AGAINST_SDPA = """
from itertools import product
import torch
from finetune.models import attention

lengths = [70, 1, 33, 200]
boundaries = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
kinds = (torch.bfloat16, torch.float16, torch.float32)  # the last one under autocast
for window, key_heads, dtype in product((None, 5), (4, 2), kinds):
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, key_heads, key_heads)]
    found = []
    for uses_kernel in (True, False):
        torch.manual_seed(0)
        parts = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            assert attention.has_kernel(*parts), "a GPU older than Ampere has no such kernel"
            output, _ = attention.padding_free_attention(
                None, *parts, None, uses_kernel=uses_kernel,
                sliding_window=window, segment_lengths=lengths, cu_seq_lens_q=boundaries, max_length_q=max(lengths),
            )
        output.float().square().sum().backward()
        found.append([output, *(part.grad for part in parts)])
    for mine, other in zip(*found, strict=True):
        assert torch.isfinite(mine).all() and mine.abs().max() > 0
        assert torch.allclose(mine.float(), other.float(), atol=0.05, rtol=0.05), (mine - other).abs().max()
    print("compared")
"""
