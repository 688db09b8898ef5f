"""A loader with worker processes."""

import multiprocessing

import numpy as np
import pytest
from accelerate import skip_first_batches
from datasets import Dataset

from finetune.dataset.collator import Collator
from finetune.dataset.dataloader import MicroBatchDataLoader, MicroBatchDataset, Prefetcher
from finetune.dataset.sampler import BatchShape, Sampler
from finetune.distributed import stop_requests


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


def ids_of(loader: MicroBatchDataLoader) -> list[list[int]]:
    return [batch["input_ids"].flatten().tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_hands_out_an_epoch_and_can_begin_anywhere(workers):
    batches = made([7, 4, 9, 2, 5, 8, 3], BatchShape(1, 2, 1))
    batches.sampler.order = "random"
    loader = MicroBatchDataLoader(batches, num_workers=workers)
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(ids_of(loader))
    assert len(loader) == len(epochs[0]) == 7 and epochs[0] != epochs[1]
    assert [batches[1, number]["input_ids"].flatten().tolist() for number in range(7)] == epochs[1]

    skipping = skip_first_batches(loader, 3)
    skipping.batch_sampler.batch_sampler.set_epoch(1)  # as the Trainer does it
    assert ids_of(skipping) == epochs[1][3:]


@pytest.mark.parametrize("is_persistent", [False, True])
def test_no_worker_outlasts_the_batches_that_it_builds_ahead(is_persistent):
    batches = made([7, 4, 9, 2, 5, 8, 3], BatchShape(1, 2, 1))  # 7 batches: 4 ahead of the 2 taken
    loader = MicroBatchDataLoader(
        batches, num_workers=2, persistent_workers=is_persistent, worker_init_fn=stop_requests.ignore_in_worker
    )
    prefetcher = Prefetcher(pins=False)
    for epoch in (0, 1):
        prefetcher.end_epoch()
        loader.set_epoch(epoch)
        taken = [batch["input_ids"].flatten().tolist() for batch in prefetcher.take(iter(loader), 2)]
        assert taken == [batches[epoch, number]["input_ids"].flatten().tolist() for number in (0, 1)]
    workers = multiprocessing.active_children()
    prefetcher.close()
    assert workers and not any(worker.is_alive() for worker in workers)
