"""Micro-batches as a loader hands them out: their form, their rows, what they count for."""

from concurrent.futures import wait

import numpy as np
import pytest
import torch
from datasets import Dataset

from finetune.dataset.collator import Collator
from finetune.dataset.dataloader import MicroBatchDataset, Prefetcher, decide_layout, padding_share
from finetune.dataset.sampler import BatchShape, Sampler
from finetune.utils.errors import ConfigError

ASKED = {
    "obstacle": None, "full_logits_because": None, "tokens_per_device": None, "per_device_batch": 8,
    "model_max_length": 512, "longest": 300, "strategy": "random",
}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "changed", "form", "said"),
    [
        ("flat", {}, ("flat", True, None, "random"), []),
        ("padded", {}, ("padded", True, None, "random"), []),
        ("packed", {}, ("packed", True, 512, "random"), []),
        ("flat", {"tokens_per_device": 400}, ("flat", True, 400, "random"), []),
        ("flat", {"strategy": "sequential"}, ("flat", True, None, "sequential"), []),
        ("flat", {"strategy": "batch_rebalance"}, ("flat", True, None, "random"), []),
        ("flat", {"strategy": "group_by_length"}, ("flat", True, None, "random"), ["group_by_length is off: flat"]),
        ("padded", {"strategy": "group_by_length"}, ("padded", True, None, "group_by_length"), []),
        (
            "flat",
            {"obstacle": "why"},
            ("padded", True, None, "random"),
            ["--batching flat: fallback to padded"],
        ),
        ("packed", {"obstacle": "why"}, ("padded", True, 4096, "random"), ["--batching packed: fallback to padded"]),
        ("padded", {"obstacle": "why"}, ("padded", True, None, "random"), []),
        ("flat", {"full_logits_because": "no"}, ("flat", False, None, "random"), ["logits are computed at all"]),
    ],
)
def test_the_form_is_as_asked_or_said(wanted, changed, form, said):
    found = decide_layout(wanted, **{**ASKED, **changed})
    assert (found.batching, found.selects_logits, found.capacity, found.order) == form
    assert len(found.notes) == len(said)
    assert all(note.startswith(begin) for note, begin in zip(found.notes, said, strict=True))


def test_a_budget_must_hold_the_longest_example():
    with pytest.raises(ConfigError, match="299: the longest example has 300 tokens"):
        decide_layout("flat", **{**ASKED, "tokens_per_device": 299})
    assert decide_layout("flat", **{**ASKED, "tokens_per_device": 300}).capacity == 300


def made(
    lengths: list[int], shape: BatchShape, weighting: str = "token", rank: int = 0, **options: object
) -> MicroBatchDataset:
    rows = [
        {
            "input_ids": list(range(10, 10 + length)),
            "labels": [-100] * (length // 2 + 1) + list(range(10 + length // 2 + 1, 10 + length)),
            "length": length,
        }
        for length in lengths
    ]
    for row in rows:
        row["num_supervised"] = sum(label != -100 for label in row["labels"])
    sampler = Sampler(np.array(lengths), shape, seed=0, order="sequential", **options)
    collator = Collator(sampler.batching != "padded", 0, True, weighting)
    return MicroBatchDataset(
        Dataset.from_list(rows), sampler, collator, rank=rank, counts_conversations=weighting == "conversation"
    )


@pytest.mark.parametrize("lengths", [[7, 4, 9, 2, 5], [6, 6, 6, 6, 6], [1, 1, 8, 1, 1]], ids=["ragged", "even", "ones"])
def test_micro_batches_count_what_the_whole_step_holds(lengths):
    batches = made(lengths, BatchShape(1, 2, 2))
    learned = [length - length // 2 - 1 for length in lengths]
    first, last = batches[0, 0]["counts"], batches[0, 2]["counts"]
    assert first.step.tokens == sum(lengths[:4]) and first.step.supervised_tokens == sum(learned[:4])
    assert first.denominator == max(1, sum(learned[:4]))
    assert first.step.pairs == sum(length * (length + 1) // 2 for length in lengths[:4])
    assert (last.tokens, last.step.tokens) == (lengths[4], lengths[4])
    by_conversation = made(lengths, BatchShape(1, 2, 2), "conversation")[0, 0]["counts"]
    assert by_conversation.denominator == sum(count > 0 for count in learned[:4])


def test_a_rank_with_nothing_left_still_has_a_batch():
    batches = made([7, 4, 9, 2, 5], BatchShape(1, 2, 2), rank=1)
    batch = batches[0, 2]
    assert batch["input_ids"].shape == (1, 1) and len(batch["targets"]) == 0
    assert (batch["counts"].tokens, batch["counts"].step.tokens) == (0, 5)


def test_padding_is_counted_as_it_will_be():
    batches = made([8, 2, 8, 4, 6, 6], BatchShape(2, 1, 1), batching="padded")
    assert padding_share(batches.sampler) == pytest.approx(1 - 34 / 44)
    batch = batches[0, 0]
    assert batch["attention_mask"].sum() == 10 and torch.equal(batch["logits_to_keep"], batch["target_positions"])


def test_tensors_that_are_the_same_are_copied_once():
    batch = made([8, 2, 8, 4], BatchShape(4, 1, 1))[0, 0]
    assert batch["logits_to_keep"] is batch["target_positions"] and batch["cu_seq_lens_q"] is batch["cu_seq_lens_k"]


def test_batches_of_the_next_steps_are_built_ahead_and_come_in_order():
    built = []
    batches = ({"number": built.append(number) or number} for number in range(9))
    prefetcher = Prefetcher(pins=False)

    def taken() -> list[int]:
        return [batch["number"] for batch in prefetcher.take(batches, 2)]

    assert taken() == [0, 1]
    wait([*prefetcher._coming])
    assert built == [0, 1, 2, 3, 4, 5]  # two steps ahead, no more
    assert [taken() for _ in range(5)] == [[2, 3], [4, 5], [6, 7], [8], []]


def test_an_error_while_a_batch_is_built_comes_with_its_step():
    prefetcher, batches = Prefetcher(pins=False), ({"number": 1 // (2 - number)} for number in range(4))
    assert len(prefetcher.take(batches, 2)) == 2
    with pytest.raises(ZeroDivisionError):
        prefetcher.take(batches, 1)
