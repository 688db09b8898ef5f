"""What a step keeps of each token and each logit, counted without a weight.

A micro-batch is run forwards and backwards on the meta device while every tensor that comes and goes is added up, so
that it is known for any architecture that transformers runs, a mixture of experts and softcaps among them. Attention is
taken to be fused: it keeps what goes in, what comes out and one number a head and token.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.models.attention import unsupported_config_reason
from finetune.preflight.memory.model_spec import Activations, Precision

FUSED = "fused_attention_of_a_trial"
LAYERS_TRIED = 8
MANY, FEW = 1 << 16, 1 << 8  # tokens or logits of a trial: so many that gradients of weights do not matter beside


@dataclass
class _Trial:
    """Bytes alive at the end of the forward pass, at most, and allocated in it altogether."""

    kept: int
    peak: int
    allocated: int


def layers_of(base: Any) -> list[Any]:
    """The modules that activation checkpointing works on, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [one for one in base.modules() if isinstance(one, GradientCheckpointingLayer)]


def trace_activations(model: Any, base: Any, precision: Precision) -> Activations | None:
    """What a step of a model on the meta device keeps; None where it cannot be run there, or would go from token to
    token. The model cannot be used for anything else afterwards.

    Args:
        model: with its adapter, if any; `base` the same without.
        precision: of the run. In float32 the CPU's attention is assumed, which copies its result once more.
    """
    if unsupported_config_reason(base.config, 1):
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
    layers = layers_of(base)
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
