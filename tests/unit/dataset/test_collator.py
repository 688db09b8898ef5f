"""Batches against plain loops over the examples; nothing predicts what belongs to another conversation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.dataset.collator import Collator, pad_token_id, pop_targets

IGNORED = -100
PAD = 2  # also what ends a turn
EXAMPLES = [
    {"input_ids": [5, 6, 2, 7], "labels": [IGNORED, 6, 2, IGNORED]},
    {"input_ids": [8, 9], "labels": [IGNORED, 9]},
    {"input_ids": [4], "labels": [IGNORED]},
    {"input_ids": [3, 3, 2], "labels": [IGNORED, IGNORED, 2]},
]


@st.composite
def examples(draw: Any) -> list[dict[str, list[int]]]:
    found = []
    for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)):
        ids = [draw(st.integers(0, 30)) for _ in range(length)]
        labels = [IGNORED] + [one if draw(st.booleans()) else IGNORED for one in ids[1:]]
        found.append({"input_ids": ids, "labels": labels})
    return found


def wanted(rows: list[dict[str, list[int]]]) -> list[tuple[int, int, int]]:
    """(example, place that predicts, what it should predict), one by one."""
    return [
        (number, place, row["labels"][place + 1])
        for number, row in enumerate(rows)
        for place in range(len(row["labels"]) - 1)
        if row["labels"][place + 1] != IGNORED
    ]


def predicted_in(batch: dict[str, Any], rows: list[dict[str, list[int]]]) -> list[tuple[int, int, int]]:
    """The same, as a batch says it."""
    places, targets = batch["target_positions"], batch["targets"].tolist()
    if places.dtype == torch.bool:
        return [(*place, target) for place, target in zip(places.nonzero().tolist(), targets, strict=True)]
    begins = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    owners = np.searchsorted(begins, places.numpy(), side="right") - 1
    return [
        (int(owner), int(place - begins[owner]), target)
        for owner, place, target in zip(owners, places.numpy(), targets, strict=True)
    ]


@given(examples())
def test_flat_rows_are_the_examples_behind_each_other(rows):
    batch = Collator(flat=True, pad_token_id=PAD, selects_logits=True)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].tolist() == [[one for row in rows for one in row["input_ids"]]]
    assert batch["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert batch["segment_lengths"] == lengths
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert predicted_in(batch, rows) == wanted(rows)
    assert batch["logits_to_keep"] is batch["target_positions"] or torch.equal(
        batch["logits_to_keep"], batch["target_positions"]
    )
    assert not {"attention_mask", "targets_per_example", "target_cells"} & {*batch} and batch["use_cache"] is False


@given(examples())
def test_padded_rows_are_the_examples_side_by_side(rows):
    batch = Collator(flat=False, pad_token_id=PAD, selects_logits=False)(rows)
    assert [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == [
        row["input_ids"] for row in rows
    ]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    assert predicted_in(batch, rows) == wanted(rows)
    assert "logits_to_keep" not in batch


class Leaking(Collator):
    """Shifts the labels of the joined row: the last token of an example predicts the first of the next."""

    def _flat(self, ids: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Any]:
        batch = super()._flat(ids, labels)
        joined, learned = np.concatenate(ids), np.concatenate(labels) != IGNORED
        learned[np.cumsum([len(one) for one in ids])[:-1]] = True
        places = np.flatnonzero(learned)
        return {**batch, "target_positions": places - 1, "targets": joined[places]}


def test_a_leak_over_a_boundary_is_seen():
    batch = Leaking(flat=True, pad_token_id=PAD, selects_logits=True)(EXAMPLES)
    assert predicted_in(batch, EXAMPLES) != wanted(EXAMPLES)


@pytest.mark.parametrize("flat", [True, False])
def test_a_rank_without_examples_gets_a_token_that_predicts_nothing(flat):
    batch = Collator(flat=flat, pad_token_id=PAD, selects_logits=True, weighting="conversation")([])
    assert batch["input_ids"].tolist() == [[PAD]]
    assert batch["targets"].shape == batch["targets_per_example"].shape == (0,)
    assert batch["target_positions"].sum() == 0 and batch["targets"].dtype == torch.int64


@given(examples())
def test_every_conversation_can_weigh_one(rows):
    batch = Collator(flat=True, pad_token_id=PAD, selects_logits=True, weighting="conversation")(rows)
    weights = 1 / batch["targets_per_example"].double()
    assert weights.sum().item() == pytest.approx(sum(any(one != IGNORED for one in row["labels"]) for row in rows))


@given(examples(), st.integers(1, 4))
def test_ranks_that_share_a_row_have_it_between_them(rows, parts):
    rows[0]["weights"] = [0.1 + number for number in range(sum(one != IGNORED for one in rows[0]["labels"]))]
    collators = [Collator(True, PAD, True, "conversation", (number, parts)) for number in range(parts)]
    whole, shared = Collator(True, PAD, True, "conversation")(rows), [collate(rows) for collate in collators]
    size = shared[0]["input_ids"].shape[1]
    joined = {name: torch.cat([one[name] for one in shared], dim=-1) for name in ("input_ids", "position_ids")}
    for name, value in joined.items():
        assert value.shape == (1, size * parts) and size * parts - whole[name].shape[1] < parts
        assert torch.equal(value[:, : whole[name].shape[1]], whole[name])
    places = torch.cat([one["target_positions"] + number * size for number, one in enumerate(shared)])
    assert torch.equal(places, whole["target_positions"])
    for name in {"targets", "targets_per_example", "target_weights"} & {*whole}:
        assert torch.equal(torch.cat([one[name] for one in shared]), whole[name])
    assert all(sum(one["segment_lengths"]) == size * parts for one in shared)


def test_weights_are_sent_only_where_one_differs():
    collate = Collator(True, PAD, True)
    weighted = [*EXAMPLES[:-1], EXAMPLES[-1] | {"weights": [0.3]}]
    targets = pop_targets(collate(weighted))
    assert targets.weights.dtype == torch.float32 and targets.tokens.tolist() == [6, 2, 9, 2]
    assert torch.equal(targets.loss_weights(), torch.tensor([1.0, 1.0, 1.0, 0.3]))
    assert "target_weights" not in collate([example | {"weights": []} for example in EXAMPLES])


def test_the_first_token_of_an_example_cannot_be_learned():
    with pytest.raises(ValueError, match="first token"):
        Collator(True, PAD, True)([{"input_ids": [5, 6], "labels": [5, 6]}])


def test_the_pad_id_is_any_there_is(golden_tokenizer, smol_tokenizer):
    assert pad_token_id(golden_tokenizer) == 0
    assert pad_token_id(smol_tokenizer) == smol_tokenizer.pad_token_id
