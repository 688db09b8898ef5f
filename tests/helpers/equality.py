"""A stock model, one conversation at a time, and this project's batches: loss and gradients of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.dataset.collator import Collator
from finetune.dataset.dataloader import MicroBatchDataset
from finetune.dataset.sampler import BatchShape, Sampler
from finetune.models.loss_head import enable_loss_head
from finetune.models.padding_free import enable_padding_free
from finetune.training.step_monitor import ComputeTimer
from finetune.training.trainer import SupervisedTrainer
from tests.helpers.lora import attach_lora
from tests.helpers.tiny_models import LONGEST, VOCAB_SIZE, InFloat64, build, conversation

QUIET_PEFT = [  # peft says what it sets by itself for GPT-2 and for Mixtral
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]
TOLERANCE = 1e-9  # of the loss, and of the largest gradient


PAD = 0


CONVERSATIONS = [
    conversation(5, range(3, 5)),
    conversation(12, range(4, 7), range(9, 12)),
    conversation(9, range(1, 9)),
    conversation(LONGEST, range(10, 11), range(14, LONGEST)),
    conversation(2, range(1, 2)),
]


NOTHING_LEARNED = [conversation(7), conversation(1)]


FAMILIES = "llama qwen3 mistral gemma gemma2 mixtral phi gpt_neox gpt2 gpt_oss".split()


@dataclass(frozen=True)
class Form:
    """How conversations are made into micro-batches."""

    batching: str
    selects_logits: bool = True
    has_loss_head: bool = True
    shape: BatchShape = BatchShape(per_device_batch=8, accumulation=1, world_size=1)
    capacity: int | None = None


FORMS = {
    "flat": Form("flat"),
    "flat, all positions": Form("flat", selects_logits=False),
    "flat, the model's logits": Form("flat", has_loss_head=False),
    "flat, all logits": Form("flat", selects_logits=False, has_loss_head=False),
    "padded": Form("padded"),
    "padded, all logits": Form("padded", selects_logits=False, has_loss_head=False),
    "two packs in a row": Form("packed", capacity=24, shape=BatchShape(2, 1, 1)),
    "accumulated": Form("flat", shape=BatchShape(3, 3, 1)),
    "three ranks, one without work": Form("flat", shape=BatchShape(1, 3, 3)),
    "padded, three ranks": Form("padded", shape=BatchShape(1, 3, 3)),
}


@dataclass
class Outcome:
    """A loss, and the gradient of every trained parameter by name."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def distance(self, wanted: Outcome) -> float:
        """The larger of the differences of the losses and of the gradients, relative to the wanted ones."""
        assert self.gradients.keys() == wanted.gradients.keys() and len(wanted.gradients) > 3
        largest = max(one.abs().max().item() for one in wanted.gradients.values())
        assert largest > 1e-3
        apart = max((one - wanted.gradients[name]).abs().max().item() for name, one in self.gradients.items())
        return max(apart / largest, abs(self.loss - wanted.loss) / abs(wanted.loss))


def outcome(model: Any, loss: torch.Tensor) -> Outcome:
    loss.backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return Outcome(loss.item(), trained)


def stock(model: Any) -> Any:
    """A copy with the eager attention of transformers."""
    model = copy.deepcopy(model)
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("eager")
    return model


def one_by_one(model: Any, examples: Sequence[dict], by_conversation: bool = False) -> Outcome:
    """The reference: the mean over learned tokens, or over conversations of their means; losses times `weights`."""
    model, sums = stock(model), []
    for example in examples:
        ids, labels = (torch.from_numpy(example[name]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        counted = (labels != -100).sum()
        if counted:
            losses = F.cross_entropy(logits[:-1], labels[1:], reduction="none")
            weights = torch.ones_like(losses)
            if example.get("weights"):
                weights[labels[1:] != -100] = torch.tensor(example["weights"], dtype=losses.dtype)
            sums.append(((losses * weights).sum(), counted))
    if by_conversation:
        return outcome(model, sum(total / counted for total, counted in sums) / len(sums))
    return outcome(model, sum(total for total, _ in sums) / sum(counted for _, counted in sums))


def micro_batches(examples: Sequence[dict], form: Form, weighting: str = "token") -> MicroBatchDataset:
    rows = [{**one, "length": len(one["labels"]), "num_supervised": (one["labels"] != -100).sum()} for one in examples]
    lengths = np.array([row["length"] for row in rows])
    sampler = Sampler(lengths, form.shape, seed=0, batching=form.batching, capacity=form.capacity)
    collate = Collator(form.batching != "padded", PAD, form.selects_logits, weighting)
    by_conversation = weighting == "conversation"
    return MicroBatchDataset(
        datasets.Dataset.from_list(rows), sampler, collate, rank=0, counts_conversations=by_conversation
    )


def compute_loss(model: Any, batches: MicroBatchDataset, batch: dict[str, Any], smoothing: float = 0.0) -> torch.Tensor:
    """`SupervisedTrainer.compute_loss` on a batch, without the rest of a run."""
    trainer = SimpleNamespace(
        train_dataset=batches,
        model=model,
        args=SimpleNamespace(label_smoothing_factor=smoothing),
        sharing_ranks=1,
        timer=ComputeTimer(torch.device("cpu"), waits_in_forward=False, waits_in_each_backward=False),
        _ranks_averaged_over=lambda: batches.sampler.shape.world_size,
    )
    return SupervisedTrainer.compute_loss(trainer, model, dict(batch))


def flat_if(model: Any, form: Form) -> Any:
    model = copy.deepcopy(model)
    if form.batching != "padded":
        assert enable_padding_free(model, longest=LONGEST, vocab_size=VOCAB_SIZE, device="cpu") is None
    if form.has_loss_head:
        collate = Collator(form.batching != "padded", PAD, form.selects_logits)
        assert enable_loss_head(model, collate, vocab_size=VOCAB_SIZE, device="cpu") is None
    return model


def trained(
    model: Any,
    examples: Sequence[dict],
    form: Form,
    *,
    smoothing: float = 0.0,
    weighting: str = "token",
    mistake: Callable[[dict[str, Any]], None] = lambda batch: None,
) -> Outcome:
    """A step as the Trainer makes it: summed over micro-batches, averaged over ranks."""
    model, batches = flat_if(model, form), micro_batches(examples, form, weighting)
    assert batches.sampler.steps_per_epoch == 1
    total: Any = 0
    for batches.rank in range(form.shape.world_size):
        for number in range(batches.sampler.micro_batches_per_epoch):
            batch = batches[0, number]
            mistake(batch)
            total = total + compute_loss(model, batches, batch, smoothing)
    return outcome(model, total / form.shape.world_size)


@cache
def prepared(family: str, adapter: str) -> tuple[Any, Outcome]:
    """A model, and what its conversations give one by one."""
    with InFloat64():
        model = build(family, dtype=torch.float64)
        if adapter == "lora":
            model = with_lora(model, ["all-linear"])
        return model, one_by_one(model, CONVERSATIONS)


def with_lora(model: Any, targets: list[str], **options: Any) -> Any:
    """LoRA that takes part: its B matrices are not zero."""
    model = attach_lora(model, r=2, alpha=4, dropout=0.0, target_modules=targets, **options).double()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()
