"""Fields that families name differently, and those that each layer has for itself."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from finetune.models.attention import sliding_window_of, unsupported_config_reason
from finetune.models.model_config import (
    attention_widths,
    by_layer,
    experts_of,
    largest,
    router_loss_weight,
    set_vocab_size,
)
from finetune.models.model_folder import check_folder, check_json_files
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models


@pytest.mark.parametrize(
    ("family", "fields", "experts"),
    [
        ("mixtral", {}, (8, 2)),
        ("aria_text", {"moe_num_experts": 6, "moe_topk": 3}, (6, 3)),
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, (4, 2)),
        ("jetmoe", {"num_local_experts": 5, "num_experts_per_tok": 2}, (5, 2)),
        ("kimi_linear", {"num_experts": 4, "num_experts_per_token": 2}, (4, 2)),
        ("gemma4_text", {}, (0, 0)),
        ("llama", {}, (0, 0)),
    ],
)
def test_experts_are_counted_whatever_the_fields_are_called(family, fields, experts):
    assert experts_of(CONFIG_MAPPING[family](**fields)) == experts


@pytest.mark.parametrize("family", ["idefics", "doge", "granite4_vision", "mamba"])
def test_the_values_that_configs_have_by_default_are_possible(family, tmp_path):
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    check_json_files(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def test_a_folder_cloned_without_git_lfs_is_refused_before_torch_and_previewed_if_only_weights_lack(tmp_path):
    CONFIG_MAPPING["llama"]().save_pretrained(tmp_path)
    for name in ("model.safetensors", "unrelated.onnx"):
        (tmp_path / name).write_text(POINTER)
    check_json_files(tmp_path)
    with pytest.raises(ConfigError, match="Git LFS, not model.safetensors: run git lfs pull"):
        check_folder(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ConfigError, match="Git LFS, not tokenizer.json: run git lfs pull"):
        check_json_files(tmp_path)


def test_the_weight_of_the_router_loss_has_several_names():
    assert router_loss_weight(CONFIG_MAPPING["jetmoe"](aux_loss_coef=0.25)) == 0.25
    assert router_loss_weight(CONFIG_MAPPING["mixtral"](router_aux_loss_coef=0.5)) == 0.5


def test_fields_of_each_layer_are_read_layer_by_layer():
    config = tiny_models.build("gemma4").config
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.head_dim
    assert by_layer(config, "head_dim") == [12, 16] and largest(config, "head_dim") == 16
    assert attention_widths(config) == [48, 64]
    assert unsupported_config_reason(config, 16) is None and sliding_window_of(config, 16) == tiny_models.WINDOW


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_a_larger_vocabulary_is_that_of_a_model_with_resized_embeddings(family):
    rows = tiny_models.VOCAB_SIZE + 2
    with torch.device("meta"):
        grown = tiny_models.build(family)
        grown.resize_token_embeddings(rows, mean_resizing=False)
        config = tiny_models.build(family).config
        set_vocab_size(config, rows)
        built = type(grown)(config)
    wanted = {name: weight.shape for name, weight in grown.named_parameters()}
    assert {name: weight.shape for name, weight in built.named_parameters()} == wanted
