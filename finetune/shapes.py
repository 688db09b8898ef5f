"""A model's config -> the numbers that the memory planner works on, without a weight.

The model is built on the meta device, where tensors have shapes and no content. Parameters are counted there, adapters
included; and a micro-batch is run forwards and backwards while every tensor that comes and goes is added up, so
that what a step keeps is known for any architecture that transformers runs, a mixture of experts and softcaps among
them. Attention is taken to be fused: it keeps what goes in, what comes out and one number a head and token.
"""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.attention import config_obstacle
from finetune.errors import FinetuneError
from finetune.memory import BYTES, Activations, Block, Precision, Shape, plain_activations

FUSED = "fused_attention_of_a_trial"
LAYERS_TRIED = 8
MANY, FEW = 1 << 16, 1 << 8  # tokens or logits of a trial: so many that gradients of weights do not matter beside
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def shape_of(
    config: Any,
    *,
    precision: Precision,
    attach: Callable[[Any], Any] | None = None,
    vocabulary: int | None = None,
    stored_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> Shape:
    """The shape of the model that `config` describes.

    Args:
        config: of transformers, as `AutoConfig.from_pretrained` gives it.
        precision: of the run. In float32 the CPU's attention is assumed, which copies its result once more.
        attach: (base) -> the model with an adapter; it is called under the meta device, so that an initialisation
            that computes with the weights (PiSSA, OLoRA) must be left out.
        vocabulary: rows of the embeddings, where the tokenizer needs more than the config says.
        stored_bytes: of the files that it is loaded from; None: all parameters in the config's own type.

    Raises:
        ConfigError: the adapter cannot be attached.
        ValueError: the model's code cannot be built without weights.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if vocabulary is not None and vocabulary > text.vocab_size:
        text.vocab_size = vocabulary
    model, base, embedding, head = _built(config, precision, attach, trust_remote_code)
    counts = Counter((one.numel(), one.requires_grad) for one in model.parameters())
    blocks = tuple(Block(size, count, trained) for (size, trained), count in sorted(counts.items()))
    layers = _layers_of(base)
    own = [sum(one.numel() for one in module.parameters(recurse=False)) for module in model.modules()]
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    visited = (getattr(text, "num_experts_per_tok", None) or 0) if experts else 0
    sleeping = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name and experts)
    of_base = sum(one.numel() for one in base.parameters()) - (_adapter_parameters(base) if attach else 0)
    shape = Shape(
        blocks=blocks,
        activations=_formula(text, precision),
        layers=len(layers) or text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        embedding=embedding.numel(),
        tied=head is not None and head.weight is embedding,
        stored_bytes=of_base * _stored_size(config) if stored_bytes is None else stored_bytes,
        largest_module=max(own),
        active=sum(one.elements for one in blocks) - round(sleeping * (1 - visited / max(experts, 1))),
        experts=experts,
        experts_per_token=visited,
        adapter=hasattr(model, "peft_config"),
    )
    counted = _counted(model, base, precision)
    return shape if counted is None else replace(shape, activations=counted)


def _built(config: Any, precision: Precision, attach: Callable[[Any], Any] | None, trusts_code: bool) -> tuple:
    """The model, its base, the weight of its input embeddings, and its head or None; all without content."""
    try:
        model = _on_meta(config, precision, attach, trusts_code)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return model, base, base.get_input_embeddings().weight, base.get_output_embeddings()
    except FinetuneError:
        raise
    except Exception as error:  # code of any model may ask for what tensors without content cannot give
        raise ValueError(f"this model's code cannot be built without weights: {error}") from error


def _on_meta(config: Any, precision: Precision, attach: Callable[[Any], Any] | None, trusts_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[precision]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusts_code)
        model = model if attach is None else attach(model)
    return model.to(dtype).train()  # peft leaves adapters on the meta device in float32


def _layers_of(base: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [one for one in base.modules() if isinstance(one, GradientCheckpointingLayer)]


def _adapter_parameters(base: Any) -> int:
    return sum(one.numel() for name, one in base.named_parameters() if "lora_" in name or "modules_to_save" in name)


def _stored_size(config: Any) -> int:
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def _formula(text: Any, precision: Precision) -> Activations:
    heads = getattr(text, "num_attention_heads", 1) or 1
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    visited = getattr(text, "num_experts_per_tok", None) or 1
    return plain_activations(
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=intermediate * visited,
        vocabulary=text.vocab_size,
        gated=str(getattr(text, "hidden_act", "silu")) in ("silu", "swish", "gelu_pytorch_tanh"),
        size=BYTES[precision],
    )


# What a step keeps, counted in a trial


@dataclass
class _Trial:
    """Bytes alive at the end of the forward pass, at most, and allocated in it altogether."""

    kept: int
    peak: int
    allocated: int


def _counted(model: Any, base: Any, precision: Precision) -> Activations | None:
    """None where the model cannot be run on the meta device, or would go from token to token there."""
    if config_obstacle(base.config, 1):
        return None
    try:
        _take_fused_attention(base, copies=precision == "float32")
        with _fewer_layers(base) as layers, _kernels_of(precision):
            return _measured(model, base, layers)
    except Exception:  # code of any model may ask for what tensors without content cannot give: there is the formula
        return None


def _measured(model: Any, base: Any, layers: list[Any]) -> Activations:
    count, tokens = len(layers), MANY - FEW
    base.activation_checkpointing_disable()
    by_layer = _kept_by_layer(model, layers)
    frozen = 0.0
    if model is not base:
        with _zero3_linear():
            frozen = sum(_kept_by_layer(model, layers)) - sum(by_layer)
    small, plain = _run(model, FEW, 1), _run(model, MANY, 1)
    some, many = _run(model, FEW, MANY // 4), _run(model, FEW, MANY)
    base.activation_checkpointing_enable()
    if model is not base:
        base.enable_input_require_grads()
    few, checkpointed = _run(model, FEW, 1), _run(model, MANY, 1)
    inputs_by_layer = _kept_by_layer(model, layers)
    kept, logits = (plain.kept - small.kept) / tokens, MANY - MANY // 4
    inputs = (checkpointed.kept - few.kept) / tokens
    layer = sum(by_layer) / count
    outside = max(kept - layer * count, 0.0)
    logit = (many.kept - some.kept) / logits
    return Activations(
        layer=layer,
        outside=outside,
        layer_input=sum(inputs_by_layer) / count,
        working=max((plain.peak - small.peak) / tokens - kept, 0.0),
        recomputing=max((checkpointed.peak - few.peak) / tokens - inputs, 0.0),
        logit=logit,
        logit_working=max((many.peak - some.peak) / logits - logit, 0.0),
        fixed=max(small.kept - FEW * kept - logit, 0.0) / count,
        frozen_inputs=max(frozen, 0.0) / count,
        passing=max((plain.allocated - small.allocated) / tokens - kept, 0.0) / count,
    )


def _kept_by_layer(model: Any, layers: list[Any]) -> list[float]:
    """Bytes a token that each layer leaves behind: what is alive when the next one is entered, less what was when it
    was. The last one's is not seen so, and is taken to be the mean of the others'."""
    seen: list[list[int]] = []
    live: list[_Live] = []

    def note(*_: Any) -> None:
        seen[-1].append(live[-1].now)

    hooks = [one.register_forward_pre_hook(note) for one in layers]
    hooks.append(layers[-1].register_forward_hook(note))
    try:
        for tokens in (FEW, MANY):
            seen.append([])
            _run(model, tokens, 1, live)
    finally:
        for hook in hooks:
            hook.remove()
    at = [(many - few) / (MANY - FEW) for few, many in zip(*seen, strict=True)]
    found = [after - before for before, after in pairwise(at)]
    return [*found[:-1], sum(found[:-1]) / (len(found) - 1)] if len(found) > 1 else found


def _run(model: Any, tokens: int, logits: int, told: list[Any] | None = None) -> _Trial:
    """One micro-batch of one row, forwards and backwards. The gradient is written over the logits, as our loss does."""
    live = _Live(model)
    if told is not None:
        told.append(live)
    inputs = {"input_ids": torch.zeros((1, tokens), dtype=torch.long, device="meta"), "use_cache": False}
    parameters = inspect.signature(type(model).forward).parameters
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = {**parameters, **inspect.signature(type(base).forward).parameters}
    if "position_ids" in parameters:
        inputs["position_ids"] = torch.arange(tokens, device="meta")[None]
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = torch.zeros(logits, dtype=torch.long, device="meta")
    hooks = [
        one.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        for one in model.parameters()
        if one.requires_grad
    ]
    collecting = gc.isenabled()
    gc.disable()
    try:
        with live:
            scores = model(**inputs).logits
            kept, allocated = live.now, live.allocated
            scores.backward(gradient=scores.detach())
    finally:
        for hook in hooks:
            hook.remove()
        if collecting:
            gc.enable()
    return _Trial(kept, live.peak, allocated)


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make, as long as somebody holds them; the model's own do not count."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = self.allocated = 0
        own = [*model.parameters(), *model.buffers()]
        self.sizes = {one.untyped_storage()._cdata: 0 for one in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._add(one.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        size = self.sizes[key] = storage.nbytes()
        self.now += size
        self.allocated += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _FusedAttention(torch.autograd.Function):
    """Of the shape of flash attention: keeps what goes in, the result and a float32 for each head and token."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        rows, heads, tokens, _ = query.shape
        result = query.new_empty(rows, tokens, heads, value.shape[3])
        ctx.save_for_backward(query, key, value, result, query.new_empty(rows, heads, tokens, dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, above: Any) -> tuple[Any, Any, Any]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _take_fused_attention(base: Any, *, copies: bool) -> None:
    from transformers import AttentionInterface

    if not base._can_set_attn_implementation():
        raise ValueError("its code does not take attention functions from transformers")

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> tuple[Any, None]:
        result = _FusedAttention.apply(query, key, value)
        return (result.clone() if copies else result), None

    AttentionInterface.register(FUSED, attend)
    base.set_attn_implementation(FUSED)


@contextmanager
def _fewer_layers(base: Any) -> Iterator[list[Any]]:
    """The layers to try, at most so many, evenly chosen: what they keep is alike, and the rest is a product."""
    layers = _layers_of(base)
    if not layers:
        raise ValueError("its layers are not told apart")
    holder = next((one for one in base.modules() if isinstance(one, torch.nn.ModuleList) and list(one) == layers), None)
    if holder is None or len(layers) <= LAYERS_TRIED:
        yield layers
        return
    chosen = [layers[number * (len(layers) - 1) // (LAYERS_TRIED - 1)] for number in range(LAYERS_TRIED)]
    holder._modules = {str(number): one for number, one in enumerate(chosen)}
    try:
        yield chosen
    finally:
        holder._modules = {str(number): one for number, one in enumerate(layers)}


class _Linear(torch.autograd.Function):
    """Keeps its input whether or not the weight is trained, as deepspeed.runtime.zero.linear does."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(input, weight)
        return input.new_empty(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, above: Any) -> tuple[Any, None, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None


@contextmanager
def _zero3_linear() -> Iterator[None]:
    plain = torch.nn.functional.linear
    torch.nn.functional.linear = lambda input, weight, bias=None: _Linear.apply(input, weight, bias)
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


class _Grouped(torch.autograd.Function):
    """Of the shape of a grouped matrix product: [rows, in] x [experts, in, out] -> [rows, out]."""

    @staticmethod
    def forward(ctx: Any, rows: Any, weights: Any) -> Any:
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(rows.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, above: Any) -> tuple[Any, Any]:
        rows, weights = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weights)


@contextmanager
def _kernels_of(precision: Precision) -> Iterator[None]:
    """What the meta device does otherwise than the device that trains: it takes grouped products in bf16 alone and
    no autocast, and its dropout keeps a mask of floats, as the CPU's does, where a GPU's keeps one of bytes."""
    functional = torch.nn.functional
    plain, grouped, cast = functional.dropout, functional.grouped_mm, torch.autocast

    def fused(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def product(rows: Any, weights: Any, **_: Any) -> Any:
        return _Grouped.apply(rows, weights)

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return cast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    functional.grouped_mm, torch.autocast = product, autocast
    if precision != "float32":
        functional.dropout = fused
    try:
        yield
    finally:
        functional.dropout, functional.grouped_mm, torch.autocast = plain, grouped, cast
