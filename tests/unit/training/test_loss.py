"""The loss and its gradient against torch's own, and what it does to memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finetune.training import loss as loss_module
from finetune.training.loss import supervised_loss, token_losses

ROWS, VOCABULARY = 23, 50
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 7)  # seven rows at a time


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, head = torch.randn(1, ROWS, 16, dtype=dtype), torch.randn(VOCABULARY, 16, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(VOCABULARY, (ROWS,))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_those_of_torch(dtype, smoothing, weighted):
    hidden, head, targets = drawn(dtype)
    weights = torch.rand(ROWS) if weighted else None

    loss = supervised_loss(hidden @ head.T, targets, scale=1 / 11, weights=weights, smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss * 3, head)

    logits = (hidden @ head.T).view(-1, VOCABULARY)
    logits = logits if dtype == torch.float64 else logits.float()
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    reference = (each if weights is None else each * weights).sum() / 11
    (wanted,) = torch.autograd.grad(reference * 3, head)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6) and loss.dtype == logits.dtype
    assert (gradient - wanted).abs().max() <= TOLERANCE[dtype] * max(1, wanted.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_loss_of_each_target_is_torch_s_and_leaves_the_logits_as_they_are(dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)  # a vocabulary of which not one row fits: one row at a time
    logits, targets = torch.randn(ROWS, VOCABULARY, dtype=dtype, requires_grad=True), torch.randint(VOCABULARY, (ROWS,))
    before = logits.detach().clone()
    wide = before if dtype == torch.float64 else before.float()
    each = token_losses(logits, targets)
    torch.testing.assert_close(each, F.cross_entropy(wide, targets, reduction="none"))
    assert torch.equal(logits, before) and not each.requires_grad


def test_a_gradient_that_float16_could_not_hold_survives_until_it_is_scaled_up():
    torch.manual_seed(0)
    logits, targets = torch.randn(ROWS, VOCABULARY, dtype=torch.float16, requires_grad=True), torch.arange(ROWS)
    (supervised_loss(logits * 1, targets, scale=2**-20) * 2**20).backward()
    wanted = (logits.detach().float().softmax(-1) - F.one_hot(targets, VOCABULARY)).half()
    torch.testing.assert_close(logits.grad, wanted, rtol=2e-3, atol=0)


def test_targets_are_found_in_rows_flat_and_padded_behind_virtual_tokens():
    logits = torch.randn(2, 6, VOCABULARY)
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    picked = torch.stack([logits[0, 2], logits[0, 4], logits[1, 3]])  # two virtual tokens stand in front
    targets = torch.tensor([3, 1, 4])
    wanted = F.cross_entropy(picked, targets, reduction="sum")
    assert supervised_loss(logits, targets, scale=1.0, target_positions=mask).item() == pytest.approx(wanted.item())
    places = torch.tensor([2, 4, 5])
    wanted = F.cross_entropy(logits[0, places], targets, reduction="sum")
    assert supervised_loss(logits[:1], targets, scale=1.0, target_positions=places).item() == pytest.approx(
        wanted.item()
    )


def test_without_targets_the_loss_is_zero_and_so_are_the_gradients():
    hidden, head, targets = drawn(torch.float32)
    loss = supervised_loss(hidden[:, :0] @ head.T, targets[:0], scale=1 / 5)
    loss.backward()
    assert loss.item() == 0 and head.grad is not None and not head.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_place_of_the_logits(dtype):
    hidden, head, targets = drawn(dtype)
    logits = hidden @ head.T
    address, seen = logits.data_ptr(), []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    supervised_loss(logits, targets, scale=1.0).backward()
    assert seen == [address]


def test_logits_stay_where_no_gradient_is_wanted():
    hidden, head, targets = drawn(torch.float32)
    with torch.no_grad():
        logits = hidden @ head.T
        before = logits.clone()
        supervised_loss(logits, targets, scale=1.0)
    assert torch.equal(logits, before)


def test_a_head_that_keeps_its_output_fails_instead_of_learning_something_else():
    hidden, head, targets = drawn(torch.float32)
    loss = supervised_loss(torch.tanh(hidden @ head.T), targets, scale=1.0)  # tanh's gradient needs what it returned
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = supervised_loss(logits * 1.0, torch.tensor([1]), scale=1.0)
    loss.backward()
    assert loss.item() == 2e4 and logits.grad.isfinite().all()
