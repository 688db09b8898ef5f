"""Memory and checkpoint sizes of real runs against the estimate."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import transformers

from finetune.checkpoint.checkpoint_size import MODEL, MODEL_STATES, OPTIMIZER
from finetune.models.adapters import attach_lora
from finetune.preflight.memory import ModelSpec, RunSpec, estimate_memory
from finetune.preflight.spec_from_config import spec_from_config
from tests.helpers.paths import ROOT
from tests.helpers.short_runs import LORA

TOKENS, LEARNED = [40, 24], 20


def predicted(shape: ModelSpec) -> float:
    kept = shape.activations
    held = kept.outside + kept.layer * shape.layers
    return sum(TOKENS) * held + LEARNED * kept.logit + kept.fixed * shape.layers


def sizes_of(output: Path) -> dict[str, int]:
    """Bytes of the files of the only checkpoint, by what they hold; and of the result."""
    (folder,) = output.glob("checkpoint-*")
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {
        MODEL: sum(path.stat().st_size for path in files if path.suffix == ".safetensors"),
        OPTIMIZER: sum(path.stat().st_size for path in files if path.name.endswith("optim_states.pt")),
        MODEL_STATES: sum(path.stat().st_size for path in files if path.name.endswith("model_states.pt")),
    }
    return {**found, "result": sum(path.stat().st_size for path in output.glob("*.safetensors"))}


@pytest.mark.parametrize(("stage", "adapter"), [(1, False), (2, True), (3, False)])
def test_checkpoints_are_as_large_as_they_are(train, tiny_model: Path, stage: int, adapter: bool):
    flags = ["--deepspeed", f"zero{stage}", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    output = train("run", *flags, *(LORA if adapter else ()))
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    attach = partial(attach_lora, r=8, alpha=16, dropout=0.0, target_modules=["all-linear"])
    shape = spec_from_config(config, precision="float32", attach=attach if adapter else None)
    job = RunSpec(stage=stage, ranks=2, tokens=64, learned=32, precision="float32", use_cpu=True)
    found, sizes = estimate_memory(shape, job), sizes_of(output)
    small = 60_000 if adapter else 400_000  # names, shapes, and what pickles need
    for name in (MODEL, MODEL_STATES, OPTIMIZER):
        assert sizes[name] == pytest.approx(found.checkpoint[name], rel=0.02, abs=small), name
    assert sizes["result"] == pytest.approx(found.result, rel=0.02, abs=small)
    assert sizes[OPTIMIZER] > small / 2


@pytest.mark.faults
@pytest.mark.parametrize("stage", [2, 3])
def test_a_measured_run(tmp_path: Path, stage: int):
    """Two ranks, a model of some ten million parameters: the resident set grows by what is predicted."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--models", "small", "--json", str(figures)]
    command += ["--adapters", "full", "--stages", str(stage), "--checkpointing", "off", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(figures.read_text())
    assert row["predicted"] == pytest.approx(row["measured"], rel=0.25)
