"""The chain in small: any architecture becomes small, and a rehearsal fails where the run would."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finetune.preflight.dry_run import shrink_config
from tests.helpers.tiers import mostly_slow

FAMILIES = "llama mistral qwen2 qwen3 qwen3_moe mixtral gemma2 gemma3_text gpt_neox deepseek_v3 phi3 gpt2 glm4 olmo2 \
gpt_oss gemma4_text starcoder2 granitemoe qwen3_next falcon mamba smollm3".split()


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["llama", "gemma3_text", "deepseek_v3", "gpt2", "mamba"]))
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
