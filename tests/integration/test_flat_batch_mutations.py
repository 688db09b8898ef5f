"""Mistakes in the boundaries of flat rows change the loss or a gradient: each one is seen."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.equality import CONVERSATIONS, FORMS, QUIET_PEFT, TOLERANCE, prepared, trained
from tests.helpers.tiers import mostly_slow
from tests.helpers.tiny_models import InFloat64

# ---- the comparison sees mistakes

pytestmark = QUIET_PEFT


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
@pytest.mark.parametrize("adapter", mostly_slow(["full", "lora"], ["full"]))
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
