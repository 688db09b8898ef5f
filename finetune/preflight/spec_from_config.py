"""Build a `ModelSpec` from a model's config, without weights.

The model is built on the meta device, where tensors have shapes and no content. Parameters are counted there, adapters
included, and activations are traced, or follow from a formula where the model cannot be traced.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from finetune.models.attention import unwrap_adapter
from finetune.models.loader import torch_dtype
from finetune.preflight.activation_trace import layers_of, trace_activations
from finetune.preflight.memory.model_spec import BYTES, Activations, Block, ModelSpec, Precision, plain_activations
from finetune.utils.errors import FinetuneError


def spec_from_config(
    config: Any,
    *,
    precision: Precision,
    attach: Callable[[Any], Any] | None = None,
    vocabulary: int | None = None,
    stored_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> ModelSpec:
    """Return the spec of the model that `config` describes.

    Args:
        config: of transformers, as `AutoConfig.from_pretrained` gives it.
        precision: of the run. In float32 the CPU's attention is assumed, which copies its result once more.
        attach: (base) -> the model with an adapter. It is called on the meta device, so it must not initialize from
            the weights (PiSSA, OLoRA).
        vocabulary: rows of the embeddings, if the tokenizer needs more than the config says.
        stored_bytes: of the weight files; None: all parameters in the type of the config.

    Raises:
        ConfigError: the adapter cannot be attached.
        ValueError: the model's code cannot be built without weights.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if vocabulary is not None and vocabulary > text.vocab_size:
        text.vocab_size = vocabulary
    try:
        model = _on_meta(config, precision, attach, trust_remote_code)
        base = unwrap_adapter(model)
        embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    except FinetuneError:
        raise
    except Exception as error:  # any model's code may need what tensors without content lack
        raise ValueError(f"this model's code cannot be built without weights: {error}") from error
    counts = Counter((parameter.numel(), parameter.requires_grad) for parameter in model.parameters())
    blocks = tuple(Block(size, count, trained) for (size, trained), count in sorted(counts.items()))
    layers = layers_of(base)
    own = [_size(module.parameters(recurse=False)) for module in model.modules()]
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    active = (getattr(text, "num_experts_per_tok", None) or 0) if experts else 0
    in_experts = _size(weight for name, weight in model.named_parameters() if ".experts." in name and experts)
    added = ("lora_", "modules_to_save") if attach else ()
    of_base = _size(weight for name, weight in base.named_parameters() if not any(part in name for part in added))
    dtype = getattr(config, "dtype", None)
    stored_size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    spec = ModelSpec(
        blocks=blocks,
        activations=_formula(text, precision),
        layers=len(layers) or text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        embedding=embedding.numel(),
        tied=head is not None and head.weight is embedding,
        stored_bytes=of_base * stored_size if stored_bytes is None else stored_bytes,
        largest_module=max(own),
        active=sum(block.elements for block in blocks) - round(in_experts * (1 - active / max(experts, 1))),
        experts=experts,
        experts_per_token=active,
        adapter=hasattr(model, "peft_config"),
    )
    traced = trace_activations(model, base, precision)
    return spec if traced is None else replace(spec, activations=traced)


def _on_meta(config: Any, precision: Precision, attach: Callable[[Any], Any] | None, trusts_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = torch_dtype(precision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusts_code)
        model = model if attach is None else attach(model)
    return model.to(dtype).train()  # peft leaves adapters on the meta device in float32


def _size(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _formula(text: Any, precision: Precision) -> Activations:
    heads = getattr(text, "num_attention_heads", 1) or 1
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None) or 1
    return plain_activations(
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=intermediate * experts,
        vocabulary=text.vocab_size,
        gated=str(getattr(text, "hidden_act", "silu")) in ("silu", "swish", "gelu_pytorch_tanh"),
        size=BYTES[precision],
    )
