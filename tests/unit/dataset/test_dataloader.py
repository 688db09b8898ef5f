"""Micro-batches as a loader hands them out: their form, their rows, what they count for."""

from concurrent.futures import wait

import numpy as np
import pytest
import torch
from datasets import Dataset

from finetune.dataset.collator import Collator
from finetune.dataset.dataloader import MicroBatchDataset, Prefetcher, padding_share
from finetune.dataset.sampler import BatchShape, Sampler


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
