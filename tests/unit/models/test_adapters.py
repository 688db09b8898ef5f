"""Which layers LoRA is attached to, as `--lora_target_modules` says it."""

from __future__ import annotations

import re

import pytest
import torch

from finetune.config.arguments import AdapterArguments
from finetune.models.adapters import attach_adapter
from finetune.models.loader import ModelInfo
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models


def adapted(*targets: str, family: str = "llama", **flags) -> list[str]:
    """Return the layers with LoRA, by their full names."""
    with torch.device("meta"):
        base = tiny_models.build(family)
        adapter = AdapterArguments(use_lora=True, lora_target_modules=list(targets), **flags)
        info = ModelInfo(family, None, False, base.config, "eager", base, (), ())
        model = attach_adapter(base, adapter, info, None)
    names = (name for name, _ in model.named_parameters() if "lora_A" in name)
    return sorted(re.sub(r"^base_model\.model\.|\.lora_A.*", "", name) for name in names)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj, v_proj"], ["q_proj v_proj"]])
def test_names_may_be_separated_by_commas(targets):
    attention = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    assert adapted(*targets) == attention


def test_one_word_with_the_signs_of_a_regular_expression_is_one_over_full_names():
    names = [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert adapted(r".*layers\.1\.mlp\..*_proj") == names
    assert adapted(r".*\.1\.(mlp|nothing)\.[a-z]{2,5}_proj") == names
    assert len(adapted("all-linear")) == 14


@pytest.mark.parametrize("targets", [["qkv_proj"], ["q_proj", "qkv_proj"], ["q_proj,qkv_proj"], [r".*qkv.*"], ["(q"]])
def test_a_name_of_no_layer_is_an_error_that_lists_the_linear_layers(targets):
    with pytest.raises(
        ConfigError,
        match="k_proj, o_proj, q_proj, v_proj .attention.; down_proj, gate_proj, up_proj .dense MLP.; lm_head",
    ):
        adapted(*targets)
    with pytest.raises(ConfigError, match="c_attn, c_proj .attention.; c_fc, c_proj .dense MLP.; lm_head"):
        adapted(*targets, family="gpt2")


def test_a_layer_to_save_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match="the model has no layer head"):
        adapted("q_proj", modules_to_save=["lm_head", "head"])
