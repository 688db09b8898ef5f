"""However a batch is made up, its loss and the gradient of every parameter are those of the conversations one by one.

The reference is none of the project's: the stock model with its own eager attention, one conversation at a time,
`F.cross_entropy` of all logits, summed and divided by the number of learned tokens. All in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import LONGEST, VOCAB_SIZE, InFloat64, build, conversation
from transformers.trainer_pt_utils import LabelSmoother

from finetune.adapters import attach_lora
from finetune.attention import make_flat
from finetune.batches import MicroBatches
from finetune.callbacks import OwnTime
from finetune.collation import Collator
from finetune.sampling import Sampler, Shape
from finetune.trainer import SupervisedTrainer

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
pytestmark = [  # peft says what it sets by itself for GPT-2 and for Mixtral
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]


@dataclass(frozen=True)
class Form:
    """How conversations are made into micro-batches."""

    batching: str
    selects_logits: bool = True
    shape: Shape = Shape(per_device_batch=8, accumulation=1, world_size=1)
    capacity: int | None = None


FORMS = {
    "flat": Form("flat"),
    "flat, all logits": Form("flat", selects_logits=False),
    "padded": Form("padded"),
    "padded, all logits": Form("padded", selects_logits=False),
    "two packs in a row": Form("packed", capacity=24, shape=Shape(2, 1, 1)),
    "accumulated": Form("flat", shape=Shape(3, 3, 1)),
    "three ranks, one without work": Form("flat", shape=Shape(1, 3, 3)),
    "padded, three ranks": Form("padded", shape=Shape(1, 3, 3)),
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
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return Outcome(loss.item(), trained)


def stock(model: Any) -> Any:
    """A copy with the eager attention of transformers."""
    model = copy.deepcopy(model)
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("eager")
    return model


def one_by_one(model: Any, examples: Sequence[dict], by_conversation: bool = False) -> Outcome:
    """The reference: the mean over learned tokens, or over conversations of their means over learned tokens."""
    model, sums = stock(model), []
    for example in examples:
        ids, labels = (torch.from_numpy(example[name]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        counted = (labels != -100).sum()
        if counted:
            sums.append((F.cross_entropy(logits[:-1], labels[1:], reduction="sum"), counted))
    if by_conversation:
        return outcome(model, sum(total / counted for total, counted in sums) / len(sums))
    return outcome(model, sum(total for total, _ in sums) / sum(counted for _, counted in sums))


def micro_batches(examples: Sequence[dict], form: Form, weighting: str = "token") -> MicroBatches:
    rows = [{**one, "length": len(one["labels"]), "num_supervised": (one["labels"] != -100).sum()} for one in examples]
    lengths = np.array([row["length"] for row in rows])
    sampler = Sampler(lengths, form.shape, seed=0, batching=form.batching, capacity=form.capacity)
    collate = Collator(form.batching != "padded", PAD, form.selects_logits, weighting)
    by_conversation = weighting == "conversation"
    return MicroBatches(
        datasets.Dataset.from_list(rows), sampler, collate, rank=0, counts_conversations=by_conversation
    )


def compute_loss(model: Any, batches: MicroBatches, batch: dict[str, Any], smoothing: float = 0.0) -> torch.Tensor:
    """`SupervisedTrainer.compute_loss` on a batch, without the rest of a run."""
    trainer = SimpleNamespace(
        train_dataset=batches,
        model=model,
        args=SimpleNamespace(label_smoothing_factor=smoothing),
        sharing_ranks=1,
        step_end=SimpleNamespace(
            own_time=OwnTime(torch.device("cpu"), waits_in_forward=False, waits_in_each_backward=False)
        ),
        _ranks_averaged_over=lambda: batches.sampler.shape.world_size,
    )
    return SupervisedTrainer.compute_loss(trainer, model, dict(batch))


def flat_if(model: Any, form: Form) -> Any:
    model = copy.deepcopy(model)
    if form.batching != "padded":
        assert make_flat(model, longest=LONGEST, vocab_size=VOCAB_SIZE, device="cpu") is None
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


# ---- every family, every form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_of_a_batch_changes_nothing(family, adapter, form):
    model, wanted = prepared(family, adapter)
    with InFloat64():
        assert trained(model, CONVERSATIONS, FORMS[form]).distance(wanted) < TOLERANCE


@pytest.mark.parametrize("form", ["flat", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_the_same_within_its_rounding(family, form):
    model, wanted = build(family), prepared(family, "full")[1]
    assert trained(model, CONVERSATIONS, FORMS[form]).distance(wanted) < 1e-5


def test_the_forms_are_what_they_say():
    packed = micro_batches(CONVERSATIONS, FORMS["two packs in a row"])
    assert len(packed.sampler.groups) == 2 and sorted(packed[0, 0]["segment_lengths"]) == [2, 5, 9, 12, 16]
    assert micro_batches(CONVERSATIONS, FORMS["accumulated"]).sampler.micro_batches_per_epoch == 2
    assert micro_batches(CONVERSATIONS, FORMS["padded"])[0, 0]["input_ids"].shape == (5, LONGEST)
    spread, tokens = micro_batches(CONVERSATIONS, FORMS["three ranks, one without work"]), []
    for spread.rank in range(3):
        tokens += [spread[0, number]["counts"].tokens for number in range(2)]
    assert sorted(tokens) == [0, 2, 5, 9, 12, 16]


def test_a_model_without_adapter_trains_everything():
    model, wanted = prepared("llama", "full")
    assert len(wanted.gradients) == len(list(model.parameters()))
    assert all(one.abs().max() > 0 for one in wanted.gradients.values())
    _, with_adapter = prepared("llama", "lora")
    assert len(with_adapter.gradients) == 2 * 2 * 7 and wanted.loss != with_adapter.loss


@pytest.mark.parametrize("form", ["flat", "padded", "accumulated"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "gpt2"])
def test_conversations_that_teach_nothing_count_for_nothing(family, form):
    """They are a micro-batch of their own, too: one that sums over no target."""
    examples = [*NOTHING_LEARNED, *CONVERSATIONS[:1]]
    with InFloat64():
        model = prepared(family, "full")[0]
        wanted = one_by_one(model, CONVERSATIONS[:1])
        found = trained(model, examples, replace(FORMS[form], shape=Shape(1, 3, 1)))
        assert found.distance(wanted) < TOLERANCE
        assert trained(model, examples, FORMS[form]).distance(wanted) < TOLERANCE


@pytest.mark.parametrize("batching", ["flat", "padded"])
@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_micro_batch_adds_zero_to_every_gradient(family, adapter, batching, selects):
    form = Form(batching, selects)
    with InFloat64():
        model, batches = flat_if(prepared(family, adapter)[0], form), micro_batches(CONVERSATIONS, form)
        empty = {**Collator(batching == "flat", PAD, selects)([]), "counts": replace(batches[0, 0]["counts"], tokens=0)}
        found = outcome(model, compute_loss(model, batches, empty))
    assert found.loss == 0 and len(found.gradients) > 3
    assert all(one is not None and not one.any() for one in found.gradients.values())


# ---- what else a model may have


def grown(model: Any) -> Any:
    model.resize_token_embeddings(VOCAB_SIZE + 2, mean_resizing=False)
    return model


# name -> (fields of the config, what is done to the model)
VARIANTS: dict[str, tuple[dict[str, Any], Callable]] = {
    "tied": ({"tie_word_embeddings": True}, lambda model: model),
    "tied, lora": ({"tie_word_embeddings": True}, lambda model: with_lora(model, ["all-linear"])),
    "lora on the head": ({}, lambda model: with_lora(model, ["q_proj", "v_proj", "lm_head"])),
    "head saved whole": ({}, lambda model: with_lora(model, ["all-linear"], modules_to_save=["lm_head"])),
    "new tokens": ({}, grown),
    "new tokens, lora": ({}, lambda model: with_lora(grown(model), ["all-linear"], train_embeddings=True)),
    "new tokens, tied, lora": (
        {"tie_word_embeddings": True},
        lambda model: with_lora(grown(model), ["all-linear"], train_embeddings=True),
    ),
}
NEW_TOKENS = [conversation(6, range(2, 6), vocab_size=VOCAB_SIZE + 2)]
NEW_TOKENS[0]["input_ids"][[1, 3]] = NEW_TOKENS[0]["labels"][3] = VOCAB_SIZE + 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_heads_and_embeddings_of_every_kind(family, variant):
    fields, change = VARIANTS[variant]
    examples = [*CONVERSATIONS, *(NEW_TOKENS if "new" in variant else [])]
    with InFloat64():
        model = change(build(family, dtype=torch.float64, **fields)).double()
        wanted = one_by_one(model, examples)
        for form in ("flat", "padded", "padded, all logits"):
            assert trained(model, examples, FORMS[form]).distance(wanted) < TOLERANCE
    assert any("lm_head" in name or "embed_tokens" in name for name in wanted.gradients) == (variant != "tied, lora")


@pytest.mark.parametrize("form", ["flat", "padded", "accumulated"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_activation_checkpointing_changes_nothing(family, adapter, form):
    model, wanted = prepared(family, adapter)
    model, runs = copy.deepcopy(model), []
    base = model.get_base_model() if adapter == "lora" else model
    # What is computed again in the backward pass has contexts of its own.
    again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), InFloat64())}
    base.activation_checkpointing_enable(activation_checkpointing_kwargs=again)
    base.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    with InFloat64():
        found = trained(model, CONVERSATIONS, FORMS[form])
    assert found.distance(wanted) < TOLERANCE
    assert runs.count(True) == 2 * (2 if form == "accumulated" else 1)


# ---- other losses


def padded_stock(examples: Sequence[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Arguments of a stock model and labels, [rows, L] each, padded at the end."""
    rows = {name: [torch.from_numpy(one[name]) for one in examples] for name in ("input_ids", "labels")}
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(rows[name], batch_first=True, padding_value=fill)
        for name, fill in (("input_ids", PAD), ("labels", -100))
    )
    lengths = torch.tensor([len(one["labels"]) for one in examples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}, labels


@pytest.mark.parametrize("form", ["flat", "flat, all logits", "padded"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_kept_even_as_in_a_padded_batch(family, adapter, form):
    with InFloat64():
        model = build(family, dtype=torch.float64, output_router_logits=True, router_aux_loss_coef=0.7)
        if adapter == "lora":
            model = with_lora(model, ["all-linear"])
        reference, (arguments, labels) = stock(model), padded_stock(CONVERSATIONS)
        wanted = outcome(reference, reference(**arguments, labels=labels).loss)
        assert trained(model, CONVERSATIONS, FORMS[form]).distance(wanted) < TOLERANCE
        model.config.output_router_logits = False
        assert trained(model, CONVERSATIONS, FORMS[form]).distance(wanted) > 1e-3


@pytest.mark.parametrize("form", ["accumulated", "three ranks, one without work"])
def test_every_micro_batch_counts_for_its_tokens_in_keeping_experts_even(form):
    batches, wanted = micro_batches(CONVERSATIONS, FORMS[form]), 0.0
    with InFloat64():
        model = build("mixtral", dtype=torch.float64, output_router_logits=True, router_aux_loss_coef=0.7)
        for rank in range(FORMS[form].shape.world_size):
            for number in range(batches.sampler.micro_batches_per_epoch):
                if rows := batches.sampler.micro_batch(0, 0, rank, number):
                    arguments, _ = padded_stock([CONVERSATIONS[row] for row in rows])
                    share = arguments["attention_mask"].sum().item() / sum(len(one["labels"]) for one in CONVERSATIONS)
                    wanted += 0.7 * share * stock(model)(**arguments).aux_loss.item()
        both = trained(model, CONVERSATIONS, FORMS[form]).loss
        model.config.output_router_logits = False
        assert both - trained(model, CONVERSATIONS, FORMS[form]).loss == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize("form", ["flat", "flat, all logits", "padded", "accumulated", "three ranks, one without work"])
def test_label_smoothing_is_that_of_transformers(form):
    with InFloat64():
        model = prepared("llama", "full")[0]
        reference, (arguments, labels) = stock(model), padded_stock(CONVERSATIONS)
        learned = (labels != -100).sum()
        loss = LabelSmoother(epsilon=0.2)(
            reference(**arguments), labels, shift_labels=True, num_items_in_batch=learned
        )  # fmt: skip
        wanted = outcome(reference, loss)
        assert trained(model, CONVERSATIONS, FORMS[form], smoothing=0.2).distance(wanted) < TOLERANCE
        assert trained(model, CONVERSATIONS, FORMS[form]).distance(wanted) > 1e-3


@pytest.mark.parametrize("form", ["flat", "flat, all logits", "padded", "accumulated", "three ranks, one without work"])
def test_conversations_can_weigh_the_same(form):
    """The weights are float32: they are rounded by 6e-8."""
    examples = [*CONVERSATIONS, *NOTHING_LEARNED]
    with InFloat64():
        model = prepared("llama", "full")[0]
        wanted = one_by_one(model, examples, by_conversation=True)
        assert trained(model, examples, FORMS[form], weighting="conversation").distance(wanted) < 1e-6
        assert trained(model, examples, FORMS[form]).distance(wanted) > 1e-3


# ---- the comparison sees mistakes


def leaks_a_label(batch: dict[str, Any]) -> None:
    """The last token of a conversation predicts the first of the next."""
    at = batch["cu_seq_lens_q"][1:2].long() - 1
    for name, value in (("target_positions", at), ("logits_to_keep", at), ("targets", batch["input_ids"][0, at + 1])):
        batch[name] = torch.cat([batch[name], value])


def leaks_in_place(batch: dict[str, Any]) -> None:
    """A learned token is exchanged for the first of the next conversation: as many targets as before."""
    batch["targets"][1] = batch["input_ids"][0, batch["cu_seq_lens_q"][1].item()]


def positions_go_on(batch: dict[str, Any]) -> None:
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]


def set_boundaries(batch: dict[str, Any], lengths: list[int]) -> None:
    batch["segment_lengths"] = lengths
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch["max_length_q"] = batch["max_length_k"] = max(lengths)


def boundaries_shift(batch: dict[str, Any]) -> None:
    first, second, *others = batch["segment_lengths"]
    set_boundaries(batch, [first + 1, second - 1, *others])


def last_boundary_shifts(batch: dict[str, Any]) -> None:
    *others, one, last = batch["segment_lengths"]
    set_boundaries(batch, [*others, one - 1, last + 1])


def whole_row(batch: dict[str, Any]) -> None:
    set_boundaries(batch, [sum(batch["segment_lengths"])])


def one_token_more(batch: dict[str, Any]) -> None:
    batch["counts"] = replace(batch["counts"], denominator=batch["counts"].denominator + 1)


def labels_shift(batch: dict[str, Any]) -> None:
    batch["logits_to_keep"] = batch["target_positions"] + 1


MISTAKES = [
    leaks_a_label,
    leaks_in_place,
    boundaries_shift,
    last_boundary_shifts,
    whole_row,
    one_token_more,
    labels_shift,
]


@pytest.mark.parametrize(
    ("family", "mistake"),
    # Rotations depend on the distance of two tokens alone: only learned positions show where they begin.
    [(family, one) for family in ("llama", "mistral", "gpt2") for one in MISTAKES] + [("gpt2", positions_go_on)],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_mistakes_are_seen(family, mistake, adapter):
    model, wanted = prepared(family, adapter)
    with InFloat64():
        assert trained(model, CONVERSATIONS, FORMS["flat"]).distance(wanted) < TOLERANCE
        assert trained(model, CONVERSATIONS, FORMS["flat"], mistake=mistake).distance(wanted) > 1e-3


@pytest.mark.parametrize("by", [-1, 1])
def test_a_window_that_is_off_by_one_is_seen(by):
    model, wanted = prepared("mistral", "full")
    model = copy.deepcopy(model)
    model.config.sliding_window += by
    with InFloat64():
        assert trained(model, CONVERSATIONS, FORMS["flat"]).distance(wanted) > 1e-3
