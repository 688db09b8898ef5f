"""Hybrid models and JetMoE on several ranks, without padding under every stage."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.helpers import ranks
from tests.helpers.batch_runs import LORA, SGD, assert_same, shape
from tests.helpers.tiny_models import build

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("jetmoe", ()),
        ("llama4", ()),
        ("qwen3_next", ("--gradient_checkpointing", "True")),
        ("lfm2", (*LORA, "--lora_target_modules", "in_proj", "out_proj", "q_proj", "v_proj", "w1", "w2", "w3")),
    ],
)
def test_ranks_and_stages_learn_the_same(tmp_path, tiny_model, rows_file, family, flags):
    folder = tmp_path / family
    shutil.copytree(tiny_model, folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    longer_chunks = {"attention_chunk_size": 512} if family == "llama4" else {}  # else its chunks are padded
    build(family, vocab_size=vocabulary, max_position_embeddings=512, **longer_chunks).save_pretrained(folder)

    def run(name: str, world_size: int, *shaped: str) -> tuple[list[dict], dict]:
        output = tmp_path / name
        argv = ["--model_name_or_path", folder, "--data_path", rows_file, "--output_dir", output, *SGD, *shaped, *flags]
        outcome = ranks.train(tmp_path / f"{name}-logs", [*argv, "--learning_rate", "0.001"], world_size)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        assert not any("fallback to padded" in text for text in outcome.outputs)
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return metrics, load_file(next(output.glob("*model.safetensors")))

    alone = run("alone", 1, *shape(8, 1, "zero1"))
    assert_same(alone, run("zero2", 2, *shape(4, 1, "zero2")), steps=4)
    assert_same(alone, run("zero3", 2, *shape(4, 1, "zero3")), steps=4)
