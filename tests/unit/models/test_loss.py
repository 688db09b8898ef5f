"""The loss and its gradient against torch's own, of logits and of a head, and what it does to memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune.dataset.collator import Targets
from finetune.models import loss as loss_module
from finetune.models.loss import Head, LossTerms, loss_of_head, loss_of_logits, token_losses
from finetune.preflight.spec_from_config import _LiveBytes

ROWS, VOCABULARY = 23, 50
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 3)  # three rows at a time
    monkeypatch.setattr(loss_module, "HEAD_BYTES", 4 * VOCABULARY * 7)  # seven rows of a head
    monkeypatch.setattr(loss_module, "SUM_BYTES", 2 * 16 * 11)  # eleven rows of a weight


def supervised_loss(logits: torch.Tensor, targets: torch.Tensor, **terms: Any) -> torch.Tensor:
    return loss_of_logits(logits, LossTerms(targets, **terms))


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
    each = token_losses(lambda: SimpleNamespace(logits=logits), {}, Targets(targets, None, None, None, None))
    torch.testing.assert_close(each, F.cross_entropy(before.float(), targets, reduction="none"))
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
    assert supervised_loss(logits, targets, scale=1.0, positions=mask).item() == pytest.approx(wanted.item())
    places = torch.tensor([2, 4, 5])
    wanted = F.cross_entropy(logits[0, places], targets, reduction="sum")
    assert supervised_loss(logits[:1], targets, scale=1.0, positions=places).item() == pytest.approx(wanted.item())


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


# ---- a head in chunks


class Model(torch.nn.Module):
    """A head behind one layer, with what models do to logits."""

    def __init__(self, *, bias: bool = False, after: Any = (), lora: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, VOCABULARY, bias=bias)
        self.after = after
        if lora:
            from peft import LoraConfig, get_peft_model

            options = LoraConfig(
                r=2, target_modules=["head"], lora_bias=bias, use_dora=not bias, init_lora_weights=False
            )
            get_peft_model(self, options)

    def hidden(self) -> torch.Tensor:
        return self.below(
            torch.ones(1, ROWS, 8, dtype=self.below.weight.dtype)
            * torch.linspace(-1, 1, ROWS)[None, :, None].to(self.below.weight.dtype)
        )

    def logits(self) -> torch.Tensor:
        logits = self.head(self.hidden())
        for function in self.after:
            logits = function(logits)
        return logits

    def chunked(self, terms: LossTerms) -> torch.Tensor:
        head = Head(self.head, self.head.forward, self.after, VOCABULARY)
        logits = loss_of_head(head, terms, self.hidden())
        assert logits.shape == (1, 0, VOCABULARY)
        assert terms.loss is not None
        return terms.loss + logits.sum()

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        trained = {name: own for name, own in self.named_parameters() if own.requires_grad}
        return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


MODELS = {
    "plain": {},
    "bias": {"bias": True},
    "soft cap": {"after": (lambda logits: logits / 3.0, torch.tanh, lambda logits: logits * 3.0)},
    "scale": {"after": (lambda logits: logits * 0.25,)},
    "LoRA": {"lora": True, "bias": True},
    "DoRA and soft cap": {"lora": True, "after": (torch.tanh,)},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_head_in_chunks_gives_what_all_logits_give_in_float64(kind, smoothing, weighted):
    model, exact = Model(**MODELS[kind]), Model(**MODELS[kind]).double()
    targets, weights = torch.randint(VOCABULARY, (ROWS,)), torch.rand(ROWS) if weighted else None
    each = torch.empty(ROWS)
    loss = model.chunked(LossTerms(targets, weights=weights, scale=1 / 11, smoothing=smoothing, each=each))
    found = model.gradients(loss * 3)

    losses = F.cross_entropy(exact.logits()[0], targets, reduction="none", label_smoothing=smoothing)
    reference = (losses if weights is None else losses * weights).sum() / 11
    wanted = exact.gradients(reference * 3)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    torch.testing.assert_close(each.double(), losses.detach(), rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys() and len(found) > 2
    for name, gradient in found.items():
        assert (gradient - wanted[name]).abs().max() <= 1e-6 * max(1, wanted[name].abs().max()), name


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 2.0**16)])
@pytest.mark.parametrize("kind", ["bias", "LoRA", "soft cap"])
def test_a_head_of_16_bits_adds_its_gradients_in_float32(kind, dtype, scale):
    """A denominator of 2**16 takes the gradients out of float16's range until the loss scale multiplies them."""
    model = Model(**MODELS[kind]).to(dtype)
    exact = Model(**MODELS[kind]).double()
    exact.load_state_dict(model.state_dict())
    targets = torch.randint(VOCABULARY, (ROWS,))
    found = model.gradients(model.chunked(LossTerms(targets, scale=1 / scale)) * scale)
    wanted = exact.gradients(F.cross_entropy(exact.logits()[0], targets, reduction="sum"))
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert (gradient - wanted[name]).abs().max() <= 2e-2 * wanted[name].abs().max(), name


def test_under_autocast_a_head_computes_in_16_bits():
    model, exact = Model(bias=True), Model(bias=True).double()
    targets = torch.randint(VOCABULARY, (ROWS,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.chunked(LossTerms(targets))
    found = model.gradients(loss)
    wanted = exact.gradients(F.cross_entropy(exact.logits()[0], targets, reduction="sum"))
    assert loss.item() == pytest.approx(F.cross_entropy(exact.logits()[0], targets, reduction="sum").item(), rel=1e-2)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - wanted[name]).abs().max() <= 2e-2 * wanted[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beyond_gradients_a_head_takes_the_memory_of_a_chunk(dtype, monkeypatch):
    """1,024 rows x 4,096 logits of 4 bytes would be 16 MiB."""
    monkeypatch.setattr(loss_module, "HEAD_BYTES", 1 << 20)
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 256 << 10)
    monkeypatch.setattr(loss_module, "SUM_BYTES", 64 << 10)
    module, hidden = torch.nn.Linear(32, 4096, bias=False, dtype=dtype), torch.randn(1024, 32, dtype=dtype)
    terms, live = LossTerms(torch.randint(4096, (1024,))), _LiveBytes(module)
    with live:
        loss_of_head(Head(module, module.forward, (), 4096), terms, hidden.requires_grad_())
    gradients = hidden.nbytes + 4 * module.weight.numel()
    assert gradients < live.peak < gradients + (1 << 20) + 2 * (256 << 10) + (64 << 10) + 100_000
    assert live.now < gradients + hidden.nbytes + 10_000  # with the hidden states themselves


def test_rows_of_hidden_states_are_selected():
    model = Model()
    mask = torch.zeros(1, ROWS - 2, dtype=torch.bool)  # two virtual tokens stand in front
    mask[0, [0, 4, 9]] = True
    targets = torch.tensor([3, 1, 4])
    loss = model.chunked(LossTerms(targets, positions=mask))
    wanted = F.cross_entropy(model.logits()[0, [2, 6, 11]], targets, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["bias", "LoRA"])
def test_a_head_without_rows_gives_zeros_to_each_parameter(kind):
    model = Model(**MODELS[kind])
    loss = model.chunked(LossTerms(torch.tensor([], dtype=torch.int64), positions=torch.tensor([], dtype=torch.int64)))
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in model.gradients(loss).values())


def test_a_frozen_head_passes_gradients_on_and_without_gradients_none_are_made():
    model = Model()
    model.head.requires_grad_(False)
    targets = torch.randint(VOCABULARY, (ROWS,))
    assert model.gradients(model.chunked(LossTerms(targets)))["below.weight"].any()
    with torch.no_grad():
        assert not model.chunked(LossTerms(targets)).requires_grad
