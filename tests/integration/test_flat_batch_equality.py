"""However a batch is made up, its loss and the gradient of every parameter are those of the conversations one by one.

The reference is none of the project's: the stock model with its own eager attention, one conversation at a time,
`F.cross_entropy` of all logits, summed and divided by the number of learned tokens. All in float64."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from finetune.dataset.collator import Collator
from finetune.dataset.sampler import BatchShape
from tests.helpers.equality import (
    CONVERSATIONS,
    FAMILIES,
    FORMS,
    NOTHING_LEARNED,
    PAD,
    QUIET_PEFT,
    TOLERANCE,
    Form,
    compute_loss,
    flat_if,
    micro_batches,
    one_by_one,
    outcome,
    prepared,
    stock,
    trained,
    with_lora,
)
from tests.helpers.tiers import mostly_slow
from tests.helpers.tiny_models import LONGEST, VOCAB_SIZE, InFloat64, build, conversation

pytestmark = QUIET_PEFT


# ---- every family, every form


FAST_FORMS = [
    *product(FAMILIES, ["full"], ["flat"]),
    *product(["llama"], ["full", "lora"], FORMS),
    ("mixtral", "lora", "accumulated"),
    ("gpt_oss", "lora", "padded"),
    ("gpt2", "lora", "two packs in a row"),
]


@pytest.mark.parametrize(
    ("family", "adapter", "form"), mostly_slow(product(FAMILIES, ["full", "lora"], FORMS), FAST_FORMS)
)
def test_the_form_of_a_batch_changes_nothing(family, adapter, form):
    model, wanted = prepared(family, adapter)
    with InFloat64():
        assert trained(model, CONVERSATIONS, FORMS[form]).distance(wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "form"), mostly_slow(product(FAMILIES, ["flat", "padded"]), [("llama", "flat"), ("gemma2", "padded")])
)
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
@pytest.mark.parametrize("family", mostly_slow(["llama", "mixtral", "gpt_oss", "gpt2"], ["gpt_oss"]))
def test_conversations_that_teach_nothing_count_for_nothing(family, form):
    """They are a micro-batch of their own, too: one that sums over no target."""
    examples = [*NOTHING_LEARNED, *CONVERSATIONS[:1]]
    with InFloat64():
        model = prepared(family, "full")[0]
        wanted = one_by_one(model, CONVERSATIONS[:1])
        found = trained(model, examples, replace(FORMS[form], shape=BatchShape(1, 3, 1)))
        assert found.distance(wanted) < TOLERANCE
        assert trained(model, examples, FORMS[form]).distance(wanted) < TOLERANCE


@pytest.mark.parametrize("batching", ["flat", "padded"])
@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["llama", "mixtral"]))
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
@pytest.mark.parametrize("family", mostly_slow(["llama", "mixtral"], ["llama"]))
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
@pytest.mark.parametrize("family", mostly_slow(["llama", "mixtral"], ["llama"]))
def test_activation_checkpointing_changes_nothing(family, adapter, form):
    prepared_model, wanted = prepared(family, adapter)
    runs = {}
    for is_checkpointed in (False, True):
        model, runs[is_checkpointed] = copy.deepcopy(prepared_model), []
        base = model.get_base_model() if adapter == "lora" else model
        if is_checkpointed:
            # What is computed again in the backward pass has contexts of its own.
            again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), InFloat64())}
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=again)
        seen = runs[is_checkpointed]
        base.model.layers[0].self_attn.register_forward_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        with InFloat64():
            found = trained(model, CONVERSATIONS, FORMS[form])
        assert found.distance(wanted) < TOLERANCE
    assert runs[True].count(True) - runs[False].count(True) == (2 if form == "accumulated" else 1)


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
@pytest.mark.parametrize("family", mostly_slow(["mixtral", "gpt_oss"], ["mixtral"]))
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
                rows = batches.sampler.micro_batch(0, 0, rank, number)
                if len(rows):
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


@pytest.mark.parametrize("weighting", ["token", "conversation"])
@pytest.mark.parametrize("form", ["flat", "flat, all logits", "padded", "accumulated", "three ranks, one without work"])
def test_losses_of_tokens_are_multiplied_by_their_weights(form, weighting):
    """The weights are float32, in the batch, and their sum divides nothing."""
    examples: list[dict] = [*CONVERSATIONS, *NOTHING_LEARNED]
    weighted = [dict(example, weights=[]) for example in examples]
    for number, values in ((0, [0.3, 2.0]), (2, [0.0] * 4 + [1.5] * 4), (4, [0.7])):
        weighted[number]["weights"] = values
    with InFloat64():
        model = prepared("llama", "full")[0]
        wanted = one_by_one(model, weighted, by_conversation=weighting == "conversation")
        assert trained(model, weighted, FORMS[form], weighting=weighting).distance(wanted) < 1e-6
        assert trained(model, examples, FORMS[form], weighting=weighting).distance(wanted) > 1e-3
        ones = [dict(example, weights=[]) for example in examples]
        assert "target_weights" not in micro_batches(ones, FORMS[form])[0, 0]
