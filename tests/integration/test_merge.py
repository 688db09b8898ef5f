"""A large model is merged in the memory of a shard."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from tests.helpers import made_results as made
from tests.helpers import tiny_models
from tests.helpers.paths import ROOT


def build(family: str, **changed):
    return tiny_models.build(family, vocab_size=made.ROWS, **changed).eval()


def adapt(model, **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    with warnings.catch_warnings():  # peft's, on what its users should think of; here it is meant
        warnings.simplefilter("ignore")
        return made.with_random_weights(get_peft_model(model, config))


@pytest.fixture
def lora(tmp_path):
    base = made.save_base(build("llama"), tmp_path / "base")
    return made.save_adapter(adapt(build("llama")), base, tmp_path / "output")


LARGE = """
import resource, sys
from pathlib import Path
import torch
from finetune.inference.run_result import read_result
from finetune import merging
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def plan(folder):
    return merging.plan_merge(read_result(folder), folder / "merged", base_name=None, dtype=None)
merging.merge(plan(Path(sys.argv[2])), shard_bytes=10**6, proves=False)
before = peak()
merged = merging.merge(plan(Path(sys.argv[1])), shard_bytes=16 * 2**20, proves=False)
print(peak() - before, merged.size)
"""


@pytest.mark.faults
def test_a_model_is_merged_in_the_memory_of_a_shard(tmp_path, lora):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8)
    base = made.save_base(build("llama", **sizes), tmp_path / "large")
    made.save_adapter(adapt(build("llama", **sizes)), base, tmp_path / "large-output")
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / "large-output", tmp_path / "output"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    growth, size = map(int, done.stdout.split())
    assert size > 350e6
    # A shard, its copy as it is written, and a layer in float32; the adapter itself takes 8 MB.
    assert growth < 120e6, f"{growth / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
