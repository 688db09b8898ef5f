"""Which heads compute the loss themselves, and what a trial says of the others."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from finetune.dataset.collator import Collator, pop_targets
from finetune.models import loss as loss_module
from finetune.models.attention import supports_logits_to_keep
from finetune.models.loss import supervised_loss
from finetune.models.loss_head import enable_loss_head, make_gradient_sparse
from finetune.models.module_kinds import loss_module as module_of
from tests.helpers.lora import attach_lora
from tests.helpers.tiny_models import GROUPED, SIZES, VOCAB_SIZE, build


def reason_of(model: Any, **options: Any) -> str | None:
    collate = Collator(flat=False, pad_token_id=0, selects_logits=supports_logits_to_keep(model))
    return enable_loss_head(model, collate, vocab_size=VOCAB_SIZE, device="cpu", **options)


def made(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **GROUPED, **fields})
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (lambda: build("llama"), 0),
        (lambda: build("llama", tie_word_embeddings=True), 0),
        (lambda: build("gpt_neox"), 0),
        (lambda: build("gemma2", final_logit_softcapping=2.0), 3),
        (lambda: made("Cohere", logit_scale=0.25), 1),
        (lambda: made("Granite", logits_scaling=8.0), 1),
        (lambda: attach_lora(build("llama"), r=2, alpha=4, dropout=0.1, target_modules=["q_proj", "lm_head"]), 0),
    ],
    ids=["plain", "tied", "another name", "soft cap", "scale", "divisor", "LoRA"],
)
def test_a_trial_finds_what_follows_the_head(model, steps, monkeypatch):
    monkeypatch.setattr(loss_module, "HEAD_BYTES", 4 * VOCAB_SIZE * 4)
    model = model()
    assert reason_of(model) is None and model.training
    module = module_of(model)
    assert len(module.forward.head.after) == steps
    assert len(module.forward.head.chunks(torch.empty(6, 32))) > 1
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, VOCAB_SIZE)


def test_of_a_head_that_is_saved_whole_the_copy_computes_the_loss():
    options = dict(r=2, alpha=4, dropout=0.0, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = attach_lora(build("llama"), **options)
    assert reason_of(model) is None
    assert type(module_of(model)) is torch.nn.Linear and module_of(model).weight.requires_grad


@pytest.mark.parametrize("after", [{}, {"final_logit_softcapping": 2.0}], ids=["plain", "soft cap"])
def test_the_gradient_of_a_tied_embedding_is_added_to_that_of_the_head_in_place(after):
    model = build("gemma2" if after else "llama", tie_word_embeddings=True, **after)
    weight, collate = model.get_input_embeddings().weight, Collator(flat=False, pad_token_id=0, selects_logits=True)
    example = {"input_ids": np.array([5, 6, 7, 5, 9, 8]), "labels": np.array([-100, 6, 7, 5, 9, 8])}

    def backward() -> tuple[torch.Tensor, bool]:
        weight.grad, batch = None, collate([example])
        loss, _ = supervised_loss(model, batch, pop_targets(batch), scale=0.2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss.backward()
        events = [event for event in profile.events() if event.name in ("aten::add", "aten::embedding_dense_backward")]
        return weight.grad, any(event.cpu_memory_usage >= weight.nbytes for event in events)

    expected, has_copy = backward()
    assert has_copy and reason_of(model) is None
    make_gradient_sparse(model.get_input_embeddings(), module_of(model))
    for _ in range(2):
        gradient, has_copy = backward()
        assert torch.allclose(gradient, expected, atol=1e-6) and not has_copy


def shifts(logits: torch.Tensor) -> torch.Tensor:
    return logits + torch.arange(VOCAB_SIZE)


def adds_in_place(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 3] += 1.0
    return logits


class Tanh(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).tanh()


@pytest.mark.parametrize(("changes", "said"), [(shifts, "scaled or capped"), (adds_in_place, "differs by")])
def test_other_changes_of_the_logits_are_refused(changes, said):
    model = build("llama")
    inner = type(model).forward

    class Changed(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = inner(self, *args, **kwargs)
            output.logits = changes(output.logits)
            return output

    model.__class__ = Changed
    assert said in reason_of(model)
    assert "forward" not in vars(model.lm_head)


def test_a_head_that_needs_its_output_and_one_that_fails_are_refused(monkeypatch):
    model = build("llama")
    head = Tanh(32, VOCAB_SIZE, bias=False)
    model.set_output_embeddings(head)
    assert "modified by an inplace operation" in reason_of(model)
    model = build("llama")
    model.get_output_embeddings = lambda: None
    assert reason_of(model) == "it has no head of its own"
    model = build("llama")
    monkeypatch.setattr("finetune.models.loss_head.first_not_none", lambda reason: reason or "another rank's")
    assert reason_of(model) == "another rank's"
