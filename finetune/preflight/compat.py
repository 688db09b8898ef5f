"""Patches of torch internals for tracing on the meta device.

Written for torch 2.13.0 and deepspeed 0.19.8. `tests/unit/preflight/test_compat.py` fails when one is no longer needed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch


class _KeepsInput(torch.autograd.Function):
    """A linear layer that keeps input and weight, whether or not the weight is trained."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return input.new_empty(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0]), None, None


class _GroupedProduct(torch.autograd.Function):
    """Shapes of a grouped matrix product: [rows, in] x [experts, in, out] -> [rows, out]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(rows.shape[0], weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows, weights = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weights)


@contextmanager
def linear_of_zero3() -> Iterator[None]:
    """Keep the input of every linear layer, as deepspeed.runtime.zero.linear does for frozen weights too."""

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return _KeepsInput.apply(input, weight, bias)

    with patch.object(torch.nn.functional, "linear", linear):
        yield


@contextmanager
def kernels_on_meta(*, fused_dropout: bool) -> Iterator[None]:
    """Make the meta device behave as the device that trains: it takes grouped products in bf16 only and no autocast.

    With `fused_dropout`, dropout keeps a mask of bytes, as a GPU does, instead of floats.
    """
    plain_autocast = torch.autocast

    def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, **_: Any) -> Any:
        return _GroupedProduct.apply(rows, weights)

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return plain_autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    with ExitStack() as patches:
        patches.enter_context(patch.object(torch.nn.functional, "grouped_mm", grouped_mm))
        patches.enter_context(patch.object(torch, "autocast", autocast))
        if fused_dropout:
            patches.enter_context(patch.object(torch.nn.functional, "dropout", dropout))
        yield
