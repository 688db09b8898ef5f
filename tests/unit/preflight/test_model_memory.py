"""What a step keeps, and how many parameters there are: counted on models without weights, against real ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers

from finetune.models import attention
from finetune.models.adapters import attach_lora, count_parameters
from finetune.preflight.memory import ModelSpec
from finetune.preflight.spec_from_config import spec_from_config
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models

TOKENS, LEARNED = [40, 24], 20
FAMILIES = ("llama", "qwen3", "gemma3", "mixtral", "gpt_neox")
WITH_ADAPTER = partial(attach_lora, r=4, alpha=8, dropout=0.1, target_modules=["all-linear"])


def qwen2() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**tiny_models.SIZES, **tiny_models.GROUPED})
    return transformers.Qwen2ForCausalLM(config).train()


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return qwen2().to(dtype) if family == "qwen2" else tiny_models.build(family, dtype=dtype)


def kept_bytes(model: Any) -> int:
    """What autograd keeps for the backward pass of a flat row, parameters not counted, each storage once."""
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(
            input_ids=torch.randint(3, 200, (1, sum(TOKENS))),
            position_ids=torch.cat([torch.arange(length) for length in TOKENS])[None],
            use_cache=False,
            segment_lengths=TOKENS,
            cu_seq_lens_q=torch.tensor([0, *TOKENS]).cumsum(0).to(torch.int32),
            logits_to_keep=torch.arange(LEARNED),
        ).logits
    storage = logits.untyped_storage()
    kept[storage.data_ptr()] = (storage.nbytes(), logits)  # the loss keeps them, as their own gradient
    return sum(size for size, _ in kept.values())


def predicted(shape: ModelSpec) -> float:
    kept = shape.activations
    held = kept.outside + kept.layer * shape.layers
    return sum(TOKENS) * held + LEARNED * kept.logit + kept.fixed * shape.layers


@pytest.mark.filterwarnings("ignore:The following")
@pytest.mark.parametrize("family", [*FAMILIES, "qwen2"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_what_autograd_keeps(family: str, adapter: bool):
    model = model_of(family)
    attach = partial(WITH_ADAPTER, dropout=0.0) if family == "mixtral" else WITH_ADAPTER
    shape = spec_from_config(model.config, precision="float32", attach=attach if adapter else None)
    attention._register()
    model.set_attn_implementation(attention.FLAT_ATTENTION)
    model = attach(model).train() if adapter else model
    assert shape.activations.is_traced
    assert predicted(shape) == pytest.approx(kept_bytes(model), rel=0.05)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2"])
def test_a_checkpointed_layer_keeps_what_it_gets(family: str):
    shape = spec_from_config(model_of(family).config, precision="bf16")
    assert shape.activations.layer_input == pytest.approx(2 * shape.hidden, rel=0.3)
    assert shape.activations.layer_input < shape.activations.layer / 4 < shape.activations.recomputing


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "qwen2"])
def test_half_precision_is_counted_apart(family: str):
    """The sums of norms stay float32, but for gpt_neox's; elsewhere it is more than half."""
    model = model_of(family, torch.bfloat16)
    shape = spec_from_config(model.config, precision="bf16")
    full = spec_from_config(model.config, precision="float32")
    assert 0.45 * full.activations.layer < shape.activations.layer < full.activations.layer
    attention._register()
    model.set_attn_implementation(attention.FLAT_ATTENTION)
    width = getattr(model.config, "head_dim", None) or shape.hidden // model.config.num_attention_heads
    copied = 2 * model.config.num_attention_heads * width  # attention on a CPU copies its result, on a GPU it does not
    assert predicted(shape) + sum(TOKENS) * shape.layers * copied == pytest.approx(kept_bytes(model), rel=0.08)


@pytest.mark.parametrize("family", sorted(set(tiny_models.FAMILIES) - {"mamba", "jamba", "lfm2", "qwen3_next"}))
def test_parameters(family: str):
    model = tiny_models.build(family)
    shape = spec_from_config(model.config, precision="float32")
    assert (shape.trainable, shape.parameters) == count_parameters(model)
    assert shape.embedding == model.get_input_embeddings().weight.numel()
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert shape.activations.layer > 0
    assert shape.activations.logit >= 4 * tiny_models.VOCAB_SIZE


@pytest.mark.parametrize("family", ["mamba", "jamba", "lfm2", "qwen3_next"])
def test_models_that_are_not_attention_alone_have_a_shape_too(family: str):
    model = tiny_models.build(family)
    shape = spec_from_config(model.config, precision="float32")
    assert shape.parameters == count_parameters(model)[1]
    assert shape.activations.layer > 0


def test_parameters_with_adapters():
    model = model_of("llama")
    shape = spec_from_config(model.config, precision="bf16", attach=partial(WITH_ADAPTER, train_embeddings=True))
    real = WITH_ADAPTER(model, train_embeddings=True)
    assert (shape.trainable, shape.parameters) == count_parameters(real)
    assert shape.adapter
    grown = spec_from_config(model.config, precision="bf16", vocabulary=300)
    assert grown.parameters - spec_from_config(model.config, precision="bf16").parameters == 2 * 100 * shape.hidden


def test_experts_that_a_token_visits():
    model = model_of("mixtral")
    shape = spec_from_config(model.config, precision="bf16")
    experts = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name)
    assert (shape.experts, shape.experts_per_token) == (4, 2)
    assert shape.active == shape.parameters - experts // 2


def test_code_that_takes_no_attention_functions_gets_the_formula(monkeypatch: pytest.MonkeyPatch):
    """The formula of a plain decoder is near what is counted of one."""
    config = model_of("llama").config
    counted = spec_from_config(config, precision="bf16").activations
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_can_set_attn_implementation", lambda self: False)
    formula = spec_from_config(config, precision="bf16").activations
    assert counted.is_traced
    assert not formula.is_traced
    assert formula.layer == pytest.approx(counted.layer, rel=0.1)
    assert formula.logit == pytest.approx(counted.logit, rel=0.05)


def test_code_that_cannot_be_built_without_weights_is_told_apart_from_a_bad_adapter():
    config = transformers.LlamaConfig(**{**tiny_models.SIZES, **tiny_models.GROUPED})

    def asks_for_content(base: Any) -> Any:
        return float(base.get_input_embeddings().weight[0, 0])

    with pytest.raises(ValueError, match="cannot be built without weights: .*meta"):
        spec_from_config(config, precision="float32", attach=asks_for_content)
    with pytest.raises(ConfigError):
        spec_from_config(config, precision="float32", attach=partial(WITH_ADAPTER, target_modules=["nowhere"]))
