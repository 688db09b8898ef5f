"""Each patch of torch's internals is still needed, and does what the device that trains does."""

import pytest
import torch
from torch.nn import functional

from finetune.preflight.compat import kernels_on_meta, linear_of_zero3


def kept_by(make, *inputs: torch.Tensor) -> list[torch.dtype]:
    """Types of the tensors that are kept for the backward pass, inputs left out."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        make(*inputs)
    return [tensor.dtype for tensor in kept if all(tensor is not one for one in inputs)]


def on_meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=grad)


def test_grouped_products_need_a_patch_in_float32():
    rows, weights, ends = on_meta(6, 8), on_meta(2, 8, 4), torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises((RuntimeError, ValueError)):
        functional.grouped_mm(rows, weights, offs=ends)
    with kernels_on_meta(fused_dropout=False):
        assert functional.grouped_mm(rows, weights, offs=ends).shape == (6, 4)


def test_autocast_needs_a_patch():
    with pytest.raises(RuntimeError):
        torch.autocast("meta", enabled=False)
    with kernels_on_meta(fused_dropout=False):
        assert torch.autocast("meta", enabled=False).device == "cpu"
    with pytest.raises(RuntimeError):
        torch.autocast("meta", enabled=False)


def test_dropout_keeps_floats_without_a_patch_and_bytes_with_one():
    hidden = on_meta(4, 4)
    assert torch.bool not in kept_by(functional.dropout, hidden)
    with kernels_on_meta(fused_dropout=True):
        assert kept_by(functional.dropout, hidden) == [torch.bool]
        assert functional.dropout(hidden, 0.5, training=False) is hidden


def test_deepspeed_keeps_the_input_of_a_frozen_layer_and_torch_does_not():
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(5, 4)
    middle = hidden * 1
    assert len(LinearFunctionForZeroStage3.apply(middle, weight).grad_fn.saved_tensors) >= 2
    assert functional.linear(middle, weight).grad_fn._saved_self is None
    with linear_of_zero3():
        assert len(functional.linear(middle, weight).grad_fn.saved_tensors) == 2
