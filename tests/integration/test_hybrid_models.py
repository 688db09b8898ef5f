"""Models that carry something from token to token: flat rows give what conversations give one by one."""

import copy
from typing import Any

import pytest
import torch

from finetune.models.attention import supports_logits_to_keep
from finetune.models.padding_free import _decoder, enable_padding_free
from finetune.models.segments import by_segment_note
from tests.helpers.equality import CONVERSATIONS, FORMS, QUIET_PEFT, Form, one_by_one, trained, with_lora
from tests.helpers.tiers import mostly_slow
from tests.helpers.tiny_models import HYBRIDS, LONGEST, VOCAB_SIZE, WINDOW, InFloat64, build

pytestmark = QUIET_PEFT
FAST = "qwen3_next lfm2 jamba bamba mamba2 qwen4_exp".split()
TOLERANCE = 1e-5  # float32: some of these models compute in it whatever the weights are


def reason(model: Any, longest: int = LONGEST, **options: Any) -> str | None:
    return enable_padding_free(model, longest=longest, vocab_size=VOCAB_SIZE, device="cpu", **options)


@pytest.mark.parametrize("family", mostly_slow(HYBRIDS, FAST))
def test_flat_rows_of_hybrid_models_give_what_single_conversations_give(family):
    model = build(family)
    form = FORMS["flat" if supports_logits_to_keep(model) else "flat, all logits"]
    assert trained(model, CONVERSATIONS, form).distance(one_by_one(model, CONVERSATIONS)) < TOLERANCE
    assert reason(model) is None and "carry something from token to token" in by_segment_note(model)


@pytest.mark.parametrize("form", ["flat", "accumulated"])
@pytest.mark.parametrize("family", mostly_slow(["qwen3_next", "bamba", "mamba", "lfm2"], ["qwen3_next", "mamba"]))
def test_layers_that_are_computed_again_find_their_conversations(family, form):
    """Both micro-batches run before the first backward pass: each is computed again with its own boundaries."""
    model = build(family)
    wanted = one_by_one(model, CONVERSATIONS)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert trained(model, CONVERSATIONS, FORMS[form]).distance(wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "targets"),
    mostly_slow(
        [
            ("qwen3_next", ["in_proj_qkvz", "out_proj"]),
            ("bamba", ["in_proj", "q_proj"]),
            ("lfm2", ["in_proj", "out_proj"]),
        ],
        [("qwen3_next", ["in_proj_qkvz", "out_proj"])],
    ),
)
def test_adapters_of_recurrent_layers_learn_the_same(family, targets):
    with InFloat64():
        model = with_lora(build(family, dtype=torch.float64), targets).float()
    assert trained(model, CONVERSATIONS, FORMS["flat"]).distance(one_by_one(model, CONVERSATIONS)) < TOLERANCE


def test_hybrid_models_without_recurrent_layers_need_nothing():
    model = build("granitemoehybrid", layer_types=["attention", "attention"])
    assert reason(model) is None and by_segment_note(model) is None


def test_ranks_cannot_share_the_rows_of_recurrent_layers():
    model = build("qwen3_next")
    assert reason(model, shared=True).startswith("ranks cannot share a conversation: 1 Qwen3NextGatedDeltaNet")
    assert by_segment_note(model) is None


def test_a_recurrent_layer_without_boundaries_does_not_train():
    model = build("mamba")
    ids = torch.arange(3, 9).repeat(2, 1)
    assert reason(model) is None
    with pytest.raises(ValueError, match="boundaries of the conversations do not reach MambaMixer"):
        model.backbone(input_ids=ids, use_cache=False)


@pytest.mark.parametrize(
    ("family", "why"), [("doge", "their code reads a mask"), ("cpmant", "padded rows differ from single conversations")]
)
def test_models_with_wrong_padded_rows_run_conversation_by_conversation(family, why):
    model = build(family)
    wanted = one_by_one(model, CONVERSATIONS)
    assert trained(model, CONVERSATIONS, FORMS["flat, all logits"]).distance(wanted) < TOLERANCE
    assert trained(model, CONVERSATIONS, FORMS["padded, all logits"]).distance(wanted) > 1e-3
    assert reason(model) is None and why in by_segment_note(model)


def test_what_runs_conversation_by_conversation_is_not_asked_for_logits():
    model = build("llama4")
    assert model.base_model is model and _decoder(model) is model.model


ROTATIONS = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 10,
        "long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "factor": 2.0,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("form", ["flat", "accumulated"])
def test_rotations_do_not_depend_on_the_conversations_beside(kind, form):
    model = build("llama", max_position_embeddings=10, rope_parameters=ROTATIONS[kind])
    reference: Any = copy.deepcopy(model)
    losses = []
    for example in CONVERSATIONS:
        outcome = one_by_one(copy.deepcopy(model), [example])
        losses.append((outcome.loss, (example["labels"] != -100).sum()))
    wanted = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert trained(model, CONVERSATIONS, FORMS[form]).loss == pytest.approx(wanted, rel=1e-6)
    padded = trained(reference, CONVERSATIONS, Form("padded")).loss
    assert abs(padded - wanted) > 1e-4
    assert reason(model) is None and "depends on the longest" in by_segment_note(model)
    assert reason(reference, longest=WINDOW) is None and by_segment_note(reference) is None
