"""Cross-entropy at supervised positions only, in little memory.

The stock loss keeps four float32 arrays of the size of the logits in addition to the logits: a copy, its log-softmax,
and the gradients of both. Here the gradient of some rows at a time is computed in the forward pass, and written over
the logits where their dtype can hold it; nothing of their size is allocated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Bytes of float32 logits processed at a time: what fits a CPU's cache; what keeps a GPU busy.
CHUNK_BYTES, GPU_CHUNK_BYTES = 2 << 20, 256 << 20


def supervised_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    scale: float,
    target_positions: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
    each: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `scale` x the sum over the targets of -log softmax(logits)[target] x weight; a scalar, float32 or wider.

    Args:
        logits: [..., V], any float dtype. Overwritten where a gradient is required.
        targets: int64 [P].
        scale: usually one over the denominator of the mean. It is applied to the gradient before rounding to the dtype
            of the logits.
        target_positions: where in `logits` the targets are predicted: indices [P] into [1, T, V], or a bool mask
            [rows, L] for [rows, L, V], after any virtual tokens. None: the logits are those of the targets.
        weights: float32 [P], or None for 1 each.
        smoothing: share of each target that is spread evenly over the vocabulary (Szegedy et al., 2016).
        each: [P], filled with the loss of each target: not scaled, not weighted, without a gradient.
    """
    if target_positions is not None:
        if target_positions.dtype == torch.bool:
            logits = logits[:, logits.shape[1] - target_positions.shape[1] :][target_positions]
        else:
            logits = logits[0, target_positions]
    return _ScaledCrossEntropySum.apply(logits.reshape(-1, logits.shape[-1]), targets, weights, scale, smoothing, each)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(logits)[target] of each target without a gradient: float32 or wider [P], of logits [P, V]."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    each = torch.empty(len(targets), dtype=wide, device=logits.device)
    supervised_loss(logits.detach(), targets, scale=1.0, each=each)
    return each


class _ScaledCrossEntropySum(torch.autograd.Function):
    """The gradient w.r.t. the logits is scale * weight * (softmax - onehot); the forward pass computes it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        scale: float,
        smoothing: float,
        each: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        gradient = _room_for_gradient(logits) if ctx.needs_input_grad[0] else None
        chunk_bytes = CHUNK_BYTES if logits.device.type == "cpu" else GPU_CHUNK_BYTES
        rows = max(1, chunk_bytes // (4 * logits.shape[-1]))
        total = torch.zeros((), dtype=wide, device=logits.device)
        for begin in range(0, len(targets), rows):
            part, wanted = logits.detach()[begin : begin + rows].to(wide), targets[begin : begin + rows, None]
            factors = scale if weights is None else weights[begin : begin + rows, None].to(wide) * scale
            aimed_at = part.gather(-1, wanted)
            if smoothing:
                aimed_at = (1 - smoothing) * aimed_at + smoothing * part.mean(-1, keepdim=True)
            largest = part.amax(-1, keepdim=True)
            # Where the logits are wide already and a gradient is wanted, all this is written over them.
            part = (part - largest if gradient is None else part.sub_(largest)).exp_()
            sums = part.sum(-1, keepdim=True)
            losses = sums.log() + largest - aimed_at
            total += (losses * factors).sum()
            if each is not None:
                each[begin : begin + rows] = losses[:, 0]
            if gradient is not None:
                part *= factors / sums
                if smoothing:
                    part -= factors * (smoothing / part.shape[-1])
                part.scatter_add_(-1, wanted, (factors * (smoothing - 1)) * torch.ones_like(largest))
                if gradient.data_ptr() != logits.data_ptr() or gradient.dtype != wide:
                    gradient[begin : begin + rows] = part
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(above).to(ctx.dtype), None, None, None, None, None


def _room_for_gradient(logits: torch.Tensor) -> torch.Tensor:
    """The logits themselves, but for float16, which cannot hold a gradient that is not yet scaled up.

    Writing through `detach` bumps their version counter: a head that keeps its output for backward fails there rather
    than compute with something else.
    """
    return torch.empty_like(logits, dtype=torch.float32) if logits.dtype == torch.float16 else logits.detach()
