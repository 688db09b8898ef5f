"""The chain in small: any architecture becomes small, and a rehearsal fails where the run would."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finetune.preflight import dry_run
from finetune.preflight.dry_run import shrink_config
from finetune.utils.errors import FinetuneError

FAMILIES = "llama mistral qwen2 qwen3 qwen3_moe mixtral gemma2 gemma3_text gpt_neox deepseek_v3 phi3 gpt2 glm4 olmo2 \
gpt_oss starcoder2 granitemoe qwen3_next falcon mamba smollm3".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_architecture_becomes_small_and_still_runs(family):
    config = CONFIG_MAPPING[family]()
    small = shrink_config(config)

    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    logits = model(torch.zeros(1, 3, dtype=torch.long)).logits

    text = small.get_text_config()
    assert text.model_type == config.get_text_config().model_type
    assert (text.hidden_size, text.vocab_size) == (64, config.get_text_config().vocab_size)
    assert text.num_hidden_layers <= max(2, len(set(getattr(text, "layer_types", None) or ())))
    assert logits.shape[-1] == text.vocab_size and bool(torch.isfinite(logits).all())


def test_grouped_heads_stay_grouped_and_whole_ones_whole():
    grouped = CONFIG_MAPPING["llama"](num_attention_heads=32, num_key_value_heads=8)
    whole = CONFIG_MAPPING["llama"](num_attention_heads=32, num_key_value_heads=32)
    assert [shrink_config(one).num_key_value_heads for one in (grouped, whole)] == [2, 4]
    assert shrink_config(whole, heads=8).num_attention_heads == 8 and grouped.num_attention_heads == 32


def test_a_run_that_fails_is_named_with_what_it_said(tmp_path):
    with pytest.raises(FinetuneError, match="two steps.*status 3: error: row 7"):
        dry_run.run_dry_run(["sh", "-c", "echo error: row 7 >&2; exit 3"], tmp_path, tmp_path / "output")


def test_another_second_step_after_going_on_is_a_failure(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    metrics = output / "metrics.jsonl"
    command = f"touch {metrics}; echo '{{\"loss\": '$(wc -l < {metrics})'}}' >> {metrics}"  # 0, then 1
    with pytest.raises(FinetuneError, match="the second step after going on"):
        dry_run.run_dry_run(["sh", "-c", command], tmp_path, output)
