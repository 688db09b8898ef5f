"""Build a `ModelSpec` from a model's config, without weights.

The model is built on the meta device, where tensors have shapes and no content. Parameters are counted there, adapters
included. A micro-batch runs forwards and backwards while the bytes of all live tensors are added up, which tells what a
step keeps for each token and each logit. So it is known for any architecture that transformers runs, mixtures of
experts and softcaps among them. Attention is taken to be fused: it keeps its inputs, its output and one number for each
head and token; with softcaps or sinks, which flash attention alone fuses, only its inputs, and what scores take is
counted beside it. Where the model cannot be traced, a formula replaces the measurement.
"""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.models.attention import unsupported_config_reason
from finetune.models.auto_class import auto_class
from finetune.models.loader import freeze_untrained, torch_dtype
from finetune.models.model_config import experts_of, largest, set_vocab_size
from finetune.models.module_kinds import (
    LINEAR_ATTENTION,
    ROUTED_EXPERTS,
    ModuleKinds,
    module_kinds,
    output_embeddings,
    unwrap_adapter,
)
from finetune.models.quantization import quantized_layers
from finetune.preflight.compat import kernels_on_meta, linear_of_zero3
from finetune.preflight.memory.model_spec import BYTES, Activations, Block, ModelSpec, Precision, plain_activations
from finetune.utils.errors import FinetuneError

FUSED = "fused_attention_of_a_trace"
MAX_LAYERS = 8
MANY, FEW = 1 << 16, 1 << 8  # tokens or logits of a pass: so many that gradients of weights do not matter


def spec_from_config(
    config: Any,
    *,
    precision: Precision,
    attach: Callable[[Any], Any] | None = None,
    vocabulary: int | None = None,
    stored_bytes: int | None = None,
    bits: int | None = None,
    trust_remote_code: bool = False,
    keeps_scores: bool = False,
) -> ModelSpec:
    """Return the spec of the model that `config` describes.

    Args:
        config: of transformers, as `AutoConfig.from_pretrained` gives it.
        precision: of the run. In float32 the CPU's attention is assumed, which copies its result once more.
        attach: (base) -> the model with an adapter. It is called on the meta device, so it must not initialize from
            the weights (PiSSA, OLoRA).
        vocabulary: rows of the embeddings, if the tokenizer needs more than the config says.
        bits: 4 or 8 where the base is quantized.
        stored_bytes: of the weight files; None: all parameters in the type of the config.
        keeps_scores: rows are padded, and attention is `eager`.

    Raises:
        ConfigError: the adapter cannot be attached.
        ValueError: the model's code cannot be built without weights.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if vocabulary is not None and vocabulary > text.vocab_size:
        set_vocab_size(config, vocabulary)
    try:
        model, kinds, quantizable = _on_meta(config, precision, attach, trust_remote_code)
        base = unwrap_adapter(model)
        embedding, head = base.get_input_embeddings().weight, output_embeddings(base)
    except FinetuneError:
        raise
    except Exception as error:  # any model's code may need what tensors without content lack
        raise ValueError(f"this model's code cannot be built without weights: {error}") from error
    counts = Counter((parameter.numel(), parameter.requires_grad) for parameter in model.parameters())
    blocks = tuple(Block(size, count, trained) for (size, trained), count in sorted(counts.items()))
    layers = layers_of(base)
    own = [_size(module.parameters(recurse=False)) for module in model.modules()]
    experts, active = experts_of(config)
    in_experts = _size(weight for name, weight in model.named_parameters() if kinds.of(name) == ROUTED_EXPERTS)
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
        quantizable=sum(quantizable),
        largest_quantizable=max(quantizable, default=0),
        bits=bits,
        adapter=hasattr(model, "peft_config"),
    )
    kept = trace_activations(model, base, precision) or spec.activations
    if keeps_scores and not kept.scored_heads:
        heads, size = largest(text, "num_attention_heads") or 1, BYTES[precision]
        scores = heads * (4 + (size if size < 4 else 0))
        kept = replace(kept, scores=scores, scores_working=heads * (8 + size), scored_heads=heads)
    return replace(spec, activations=kept)


def _on_meta(
    config: Any, precision: Precision, attach: Callable[[Any], Any] | None, trusts_code: bool
) -> tuple[Any, ModuleKinds, list[int]]:
    """Return the model, its kinds of modules, and the sizes of the layers that could be quantized."""
    dtype = torch_dtype(precision)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trusts_code)
        kinds = module_kinds(model)
        freeze_untrained(model, kinds)
        quantizable = [_size(layer.parameters()) for layer in quantized_layers(model).values()]
        model = model if attach is None else attach(model)
    return model.to(dtype).train(), kinds, quantizable  # peft leaves adapters on the meta device in float32


def _size(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _formula(text: Any, precision: Precision) -> Activations:
    heads = largest(text, "num_attention_heads") or 1
    intermediate = largest(text, "intermediate_size") or 4 * text.hidden_size
    return plain_activations(
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=largest(text, "num_key_value_heads") or heads,
        head_dim=largest(text, "head_dim") or text.hidden_size // heads,
        intermediate=intermediate * (experts_of(text)[1] or 1),
        vocabulary=text.vocab_size,
        gated=str(getattr(text, "hidden_act", "silu")) in ("silu", "swish", "gelu_pytorch_tanh"),
        size=BYTES[precision],
    )


@dataclass
class _Pass:
    """Bytes alive at the end of the forward pass, and the peak of both passes."""

    kept: int
    peak: int


def layers_of(base: Any) -> list[Any]:
    """Return the modules of the language model that activation checkpointing works on, in order; no vision tower's."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def trace_activations(model: Any, base: Any, precision: Precision) -> Activations | None:
    """Measure what a step of a model on the meta device keeps. The model is unusable afterwards.

    Args:
        model: with its adapter, if any; `base` the same without.
        precision: of the run. In float32 the CPU's attention is assumed, which copies its result once more.

    Returns None where the model cannot run there, or processes token by token.
    """
    if unsupported_config_reason(base.config, 1) or LINEAR_ATTENTION in module_kinds(base).by_module.values():
        return None
    try:
        scores = _take_attention_without_content(base, copies=precision == "float32")
        with _fewer_layers(base) as layers, kernels_on_meta(fused_dropout=precision != "float32"):
            found = _measured(model, base, layers)
        kept, working, heads = (sum(each) / len(layers) for each in zip((0, 0, 0), *scores.values(), strict=True))
        return replace(found, scores=kept, scores_working=working, scored_heads=round(heads))
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
    base = unwrap_adapter(model)
    parameters = {name for module in (model, base) for name in inspect.signature(type(module).forward).parameters}
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
            kept = live.now
            scores.backward(gradient=scores.detach())
    finally:
        for hook in hooks:
            hook.remove()
        if collecting:
            gc.enable()
    return _Pass(kept, live.peak)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations create, while they are referenced; the model's own do not count."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
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
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Attention(torch.autograd.Function):
    """Memory of attention: keeps its inputs; if fused, also the result and a float32 for each head and token."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_fused: bool) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        result = query.new_empty(rows, tokens, heads, value.shape[3])
        of_kernel = [result, query.new_empty(rows, heads, tokens, dtype=torch.float32)] if is_fused else []
        ctx.save_for_backward(query, key, value, *of_kernel)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None


def _take_attention_without_content(base: Any, *, copies: bool) -> dict[int, tuple[int, int, int]]:
    """Let the model attend without content; return, by layer, bytes of scores and their heads, once it has run.

    They are what is kept for the backward pass, and the peak beyond it. As `models.attention` computes softcaps and
    sinks: kept are the softmax in float32, the same in 16 bits, what tanh returns, and a mask; at the peak there are
    two gradients of the scores beside them.
    """
    from transformers import AttentionInterface

    if not base._can_set_attn_implementation():
        raise ValueError("its code does not take attention functions from transformers")

    scores: dict[int, tuple[int, int, int]] = {}

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any = None, *, softcap: Any = None, s_aux: Any = None,
        **_: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        heads, size = query.shape[1], query.element_size()
        scores[id(module)] = (0, 0, 0)
        is_fused = softcap is None and s_aux is None
        if not is_fused:
            kept = 4 + (size if size < 4 else 0) + (0 if softcap is None else size)
            scores[id(module)] = (heads * kept + 1, heads * (8 + size), heads)
            key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
        result: Any = _Attention.apply(query, key, value, is_fused)
        return (result.clone() if copies and is_fused else result), None

    AttentionInterface.register(FUSED, attend)
    base.set_attn_implementation(FUSED)
    return scores


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
