"""Memory that a step keeps for each token and each logit, measured on a model without weights.

A micro-batch runs forwards and backwards on the meta device while the bytes of all live tensors are added up. So it is
known for any architecture that transformers runs, mixtures of experts and softcaps among them. Attention is taken to be
fused: it keeps its inputs, its output and one number for each head and token.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.models.attention import unsupported_config_reason, unwrap_adapter
from finetune.preflight.compat import kernels_on_meta, linear_of_zero3
from finetune.preflight.memory.model_spec import Activations, Precision

FUSED = "fused_attention_of_a_trace"
MAX_LAYERS = 8
MANY, FEW = 1 << 16, 1 << 8  # tokens or logits of a pass: so many that gradients of weights do not matter


@dataclass
class _Pass:
    """Bytes alive at the end of the forward pass, the peak of both passes, and all that the forward one allocated."""

    kept: int
    peak: int
    allocated: int


def layers_of(base: Any) -> list[Any]:
    """Return the modules that activation checkpointing works on, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def trace_activations(model: Any, base: Any, precision: Precision) -> Activations | None:
    """Measure what a step of a model on the meta device keeps. The model is unusable afterwards.

    Args:
        model: with its adapter, if any; `base` the same without.
        precision: of the run. In float32 the CPU's attention is assumed, which copies its result once more.

    Returns None where the model cannot run there, or processes token by token.
    """
    if unsupported_config_reason(base.config, 1):
        return None
    try:
        _take_fused_attention(base, copies=precision == "float32")
        with _fewer_layers(base) as layers, kernels_on_meta(fused_dropout=precision != "float32"):
            return _measured(model, base, layers)
    except Exception:  # any model's code may need what tensors without content lack: the formula is used instead
        return None


def _measured(model: Any, base: Any, layers: list[Any]) -> Activations:
    count, tokens = len(layers), MANY - FEW
    base.activation_checkpointing_disable()
    by_layer = _kept_by_layer(model, layers)
    frozen = 0.0
    if model is not base:
        with linear_of_zero3():
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
    logit = (many.kept - some.kept) / logits
    return Activations(
        layer=layer,
        outside=max(kept - layer * count, 0.0),
        layer_input=sum(inputs_by_layer) / count,
        working=max((plain.peak - small.peak) / tokens - kept, 0.0),
        recomputing=max((checkpointed.peak - few.peak) / tokens - inputs, 0.0),
        logit=logit,
        logit_working=max((many.peak - some.peak) / logits - logit, 0.0),
        fixed=max(small.kept - FEW * kept - logit, 0.0) / count,
        frozen_inputs=max(frozen, 0.0) / count,
        passing=max((plain.allocated - small.allocated) / tokens - kept, 0.0) / count,
    )


def _kept_by_layer(model: Any, layers: Sequence[Any]) -> list[float]:
    """Return the bytes a token that each layer leaves behind: those alive when the next layer is entered, less those
    when it was. For the last layer, where this cannot be seen, the mean of the others."""
    seen: list[list[int]] = []
    live: list[_LiveBytes] = []

    def note(*_: Any) -> None:
        seen[-1].append(live[-1].now)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(note))
    try:
        for tokens in (FEW, MANY):
            seen.append([])
            _run(model, tokens, 1, live)
    finally:
        for hook in hooks:
            hook.remove()
    per_token = [(many - few) / (MANY - FEW) for few, many in zip(*seen, strict=True)]
    kept = [after - before for before, after in pairwise(per_token)]
    return [*kept[:-1], sum(kept[:-1]) / (len(kept) - 1)] if len(kept) > 1 else kept


def _run(model: Any, tokens: int, logits: int, started: list[_LiveBytes] | None = None) -> _Pass:
    """Run a micro-batch of one row forwards and backwards; the gradient overwrites the logits, as in our loss."""
    live = _LiveBytes(model)
    if started is not None:
        started.append(live)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros((1, tokens), dtype=torch.long, device="meta"),
        "use_cache": False,
    }
    parameters = {
        name for module in (model, unwrap_adapter(model)) for name in inspect.signature(type(module).forward).parameters
    }
    if "position_ids" in parameters:
        inputs["position_ids"] = torch.arange(tokens, device="meta")[None]
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = torch.zeros(logits, dtype=torch.long, device="meta")
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in model.parameters()
        if parameter.requires_grad
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
    return _Pass(kept, live.peak, allocated)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations create, while they are referenced; the model's own do not count."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = self.allocated = 0
        self.sizes = {own.untyped_storage()._cdata: 0 for own in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
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
    """Memory of flash attention: keeps its inputs, the result and a float32 for each head and token."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        result = query.new_empty(rows, tokens, heads, value.shape[3])
        ctx.save_for_backward(query, key, value, result, query.new_empty(rows, heads, tokens, dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _take_fused_attention(base: Any, *, copies: bool) -> None:
    from transformers import AttentionInterface

    if not base._can_set_attn_implementation():
        raise ValueError("its code does not take attention functions from transformers")

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> tuple[Any, None]:
        result: Any = _FusedAttention.apply(query, key, value)
        return (result.clone() if copies else result), None

    AttentionInterface.register(FUSED, attend)
    base.set_attn_implementation(FUSED)


@contextmanager
def _fewer_layers(base: Any) -> Iterator[list[Any]]:
    """Leave at most `MAX_LAYERS` layers in the model, evenly chosen: the others keep the same."""
    layers = layers_of(base)
    if not layers:
        raise ValueError("it has no layers that transformers can checkpoint")
    lists = (module for module in base.modules() if isinstance(module, torch.nn.ModuleList))
    holder = next((module for module in lists if list(module) == layers), None)
    if holder is None or len(layers) <= MAX_LAYERS:
        yield layers
        return
    chosen = [layers[number * (len(layers) - 1) // (MAX_LAYERS - 1)] for number in range(MAX_LAYERS)]
    before = holder._modules
    holder._modules = {str(number): layer for number, layer in enumerate(chosen)}
    try:
        yield chosen
    finally:
        holder._modules = before
