"""Learning rates of embeddings, head and LoRA+: against AdamW written out by hand, and against peft's groups."""

import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

from finetune.config import AdapterArguments
from finetune.models.adapters import attach_peft
from finetune.models.module_kinds import module_kinds
from finetune.training.learning_rates import set_learning_rates
from tests.helpers import tiny_models

RATE, DECAY, STEPS, BETAS, EPSILON = 1e-2, 0.1, 4, (0.9, 0.999), 1e-8


def trainer_of(tmp_path, adapter: AdapterArguments, optim: str = "adamw_torch") -> Trainer:
    base = tiny_models.build("llama")
    kinds = module_kinds(base)
    model = attach_peft(base, adapter) if adapter.kind() else base
    args = TrainingArguments(
        str(tmp_path), learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="linear", use_cpu=True, optim=optim,
        report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, args)
    set_learning_rates(trainer, adapter, kinds)
    trainer.create_optimizer_and_scheduler(STEPS)
    return trainer


def by_hand(weight: torch.Tensor, gradients: list[torch.Tensor], rate: float, decay: float) -> torch.Tensor:
    """AdamW under a linear schedule, https://arxiv.org/abs/1711.05101."""
    first = second = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        now = rate * (1 - step / STEPS)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        scaled = [moment / (1 - beta ** (step + 1)) for moment, beta in zip((first, second), BETAS, strict=True)]
        weight = weight * (1 - now * decay) - now * scaled[0] / (scaled[1].sqrt() + EPSILON)
    return weight


@pytest.mark.parametrize(
    ("flags", "faster"),
    [
        ({"embedding_learning_rate": 3e-3}, {r"embed_tokens|lm_head": 3e-3}),
        ({"use_lora": True, "lora_dropout": 0.0, "loraplus_lr_ratio": 16}, {r"lora_B": 16 * RATE}),
        (
            {"use_lora": True, "lora_dropout": 0.0, "modules_to_save": ["lm_head"], "embedding_learning_rate": 1e-3,
             "loraplus_lr_ratio": 4, "lora_target_modules": ["q_proj"]},
            {r"lm_head": 1e-3, r"lora_B": 4 * RATE},
        ),
    ],
)  # fmt: skip
def test_each_weight_moves_as_adamw_with_its_rate_moves_it(flags, faster, tmp_path):
    trainer = trainer_of(tmp_path, AdapterArguments(**flags))
    model, ids = trainer.model, torch.arange(5, 15)[None]
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in trained}
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        for name, weight in trained.items():
            gradients[name].append(weight.grad.clone())
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()

    used = set()
    for name, weight in trained.items():
        rate = next((rate for pattern, rate in faster.items() if re.search(pattern, name)), RATE)
        used.add(rate)
        expected = by_hand(before[name], gradients[name], rate, 0.0 if "norm" in name else DECAY)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
    assert used >= set(faster.values())


def test_the_groups_of_lora_plus_are_those_of_peft(tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    trainer = trainer_of(tmp_path, AdapterArguments(use_lora=True, loraplus_lr_ratio=8))
    peers = create_loraplus_optimizer(
        trainer.model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=8, loraplus_weight_decay=DECAY
    )
    ours, theirs = (
        {(group["initial_lr" if "initial_lr" in group else "lr"], group["weight_decay"]): set(map(id, group["params"]))
         for group in optimizer.param_groups if group["params"]}
        for optimizer in (trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer,
                          peers)
    )  # fmt: skip
    assert ours == theirs and len(ours) == 2


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch_fused"])
def test_other_optimizers_have_the_same_groups(optim, tmp_path):
    trainer = trainer_of(tmp_path, AdapterArguments(embedding_learning_rate=3e-3), optim)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {RATE, 3e-3}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        list(trainer.model.parameters())
    )


def test_without_a_rate_the_groups_are_those_of_transformers(tmp_path):
    assert len(trainer_of(tmp_path, AdapterArguments()).optimizer.param_groups) == 2
