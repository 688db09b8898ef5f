"""Attention over padding-free batches: one flat row of many conversations, each attending to itself only.

    input_ids       5 6 7 8 9
    segment         a a a b b      8 is the first token of its conversation and attends to nothing before it

With flash attention, transformers implements it (`cu_seq_lens_q`). Otherwise models are switched to `FLAT_ATTENTION`,
registered through transformers' `AttentionInterface`: torch's variable-length kernel where it is supported, else one
`scaled_dot_product_attention` per conversation, which needs no mask and costs the sum of the squared lengths, not the
square of their sum. `padding_free.enable_padding_free` tests whether a model supports it.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from finetune.models.model_config import largest
from finetune.models.module_kinds import unwrap_adapter
from finetune.models.segments import lengths_of_row

FLAT_ATTENTION = "flat_attention"
SCORES_AT_ONCE = 2**24  # of all heads, where no fused kernel computes them


def padding_free_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    segment_lengths: Sequence[int] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    uses_kernel: bool = True,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention inside each segment.

    Args:
        query: [1, heads, T, head_dim].
        key: [1, key_heads, T, head_dim], as is `value`; `heads` is a multiple of `key_heads`.
        segment_lengths: Tokens of each conversation; their sum is T. `cu_seq_lens_q` and `max_length_q` are the same
            for kernels.
        sliding_window: Number of tokens that each token attends to, itself included.
        softcap: Scores become softcap * tanh(score / softcap).
        s_aux: [heads], an additional logit per head in the softmax without a value (attention sink).
        uses_kernel: Call torch's variable-length kernel where it computes the input.

    Returns:
        Output [1, T, heads, head_dim], and None in place of attention weights.

    Raises:
        ValueError: The input is not one flat row: a mask, a cache, a position bias, missing or wrong lengths.
    """
    if attention_mask is not None or position_bias is not None:
        raise ValueError("flat rows take no attention mask and no position bias")
    segment_lengths = segment_lengths or lengths_of_row()
    if segment_lengths is None:
        raise ValueError("the boundaries of the conversations do not reach the attention")
    if not sum(segment_lengths) == query.shape[2] == key.shape[2] or len(query) != 1:
        raise ValueError(
            f"conversations of {list(segment_lengths)} tokens are not a flat row of queries {list(query.shape)} "
            f"and keys {list(key.shape)}"
        )
    query, key, value = _in_autocast_type(query, key, value)
    is_standard = softcap is None and s_aux is None
    if uses_kernel and is_standard and not dropout and cu_seq_lens_q is not None and max_length_q:
        options = kernel_options(query, key, value, scaling=scaling, window=sliding_window, longest=max_length_q)
        if options is not None:
            return _attend_with_kernel(query, key, value, cu_seq_lens_q, max_length_q, options), None
    if is_standard:
        attend = partial(_attend, dropout=dropout, scaling=scaling, window=sliding_window)
    else:
        attend = partial(
            _attend_unfused,
            dropout=dropout, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux,
        )  # fmt: skip
    # The backward pass of `split` allocates one gradient; slices would each allocate one of full length.
    segments = zip(*(states.split(list(segment_lengths), dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(*segment) for segment in segments], dim=2).transpose(1, 2).contiguous(), None


def _in_autocast_type(*states: torch.Tensor) -> list[torch.Tensor]:
    """Cast to the type that autocast computes in: norms and rotary embeddings leave queries and keys in float32."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(states)
    return [part.to(torch.get_autocast_dtype(device)) for part in states]


def kernel_options(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: Any, window: int | None, longest: int
) -> dict[str, Any] | None:
    """Return the options with which torch's variable-length kernel computes the input; None if it cannot.

    They follow its signature: torch 2.10 has `is_causal`, 2.11 `scale` and `window_size`, 2.12 `enable_gqa`.
    """
    if not has_kernel(query, key, value):
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters_of(varlen_attn)
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None or window >= longest:
        options["is_causal"] = True
    else:
        return None
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None and scaling != query.shape[-1] ** -0.5:
        return None
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    return options


@cache
def _parameters_of(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def has_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's kernel supports types, shapes and device: Ampere or newer, 16 bits, certain head sizes."""
    query, key, value = _in_autocast_type(query, key, value)
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_with_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    options: dict[str, Any],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" not in options:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    output: Any = varlen_attn(queries, keys, values, boundaries, boundaries, longest, longest, **options)
    return output[None]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, scaling: Any, window: int | None
) -> torch.Tensor:
    length = query.shape[2]
    mask = _causal_mask(length, length, window, query.device) if window is not None and window < length else None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _attend_unfused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Compute attention without a fused kernel, for scores that none supports.

    The scores of a block of queries exist at a time: the backward pass computes them again.
    """
    heads, length, width = query.shape[1:]
    key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    scale = width**-0.5 if scaling is None else scaling
    precise = torch.promote_types(query.dtype, torch.float32)
    sinks = None if sinks is None else sinks.to(precise).view(1, heads, 1, 1)
    block = max(1, min(length, SCORES_AT_ONCE // (heads * length)))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = _causal_mask(query.shape[2], key.shape[2], window, query.device)
        scores = query @ key.transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.to(precise).masked_fill(~mask, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.expand(1, heads, len(mask), 1)], dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
        return F.dropout(weights, dropout) @ value

    outputs = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        first = 0 if window is None else max(0, begin - window + 1)
        states = query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end]
        outputs.append(checkpoint(attend, *states, use_reentrant=False, preserve_rng_state=dropout > 0))
    return torch.cat(outputs, dim=2)


def _causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool [queries, keys]: the last queries attend to the keys up to themselves, or to `window` of these."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries + 1 - window)


def unsupported_config_reason(config: Any, longest: int) -> str | None:
    """Return why a model with this config cannot run flat rows of conversations up to `longest` tokens, or None."""
    config = config.get_text_config()
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "its attention adds a position bias (config: alibi)"
    chunk = largest(config, "attention_chunk_size")
    if chunk and chunk < longest:
        return f"its attention works in chunks of {chunk} tokens (config: attention_chunk_size)"
    return None


def sliding_window_of(config: Any, longest: int) -> int | None:
    """Return the sliding window, or None if it does not matter for conversations up to `longest` tokens."""
    window, kinds = largest(config, "sliding_window"), getattr(config.get_text_config(), "layer_types", None)
    slides = window and window < longest and (kinds is None or "sliding_attention" in kinds)
    return window if slides else None


def supports_logits_to_keep(model: Any) -> bool:
    """Whether the model can compute logits at selected positions: transformers' `logits_to_keep`."""
    forward = inspect.unwrap(type(unwrap_adapter(model)).forward)
    return "logits_to_keep" in inspect.signature(forward).parameters and "slice_logits_to_keep" in forward.__globals__


def register_flat_attention(function: Any = padding_free_attention) -> None:
    """Register without a mask function: transformers then builds no mask and ignores a given one."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLAT_ATTENTION, function)
