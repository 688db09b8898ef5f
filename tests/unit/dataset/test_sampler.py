"""Which rows are in which micro-batch: each once an epoch, the same steps on any ranks, alike for all of them."""

import hashlib
import heapq
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.dataset.dataloader import padding_share
from finetune.dataset.sampler import BatchShape, Sampler, shuffled

SHAPES = [BatchShape(8, 1, 1), BatchShape(4, 1, 2), BatchShape(2, 2, 2), BatchShape(1, 8, 1), BatchShape(1, 1, 8)]
KINDS = {
    "flat": {},
    "padded": {"batching": "padded"},
    "by length": {"batching": "padded", "order": "group_by_length"},
    "sequential": {"order": "sequential"},
    "packed": {"batching": "packed", "capacity": 60},
    "budget": {"capacity": 60},
    "padded budget": {"batching": "padded", "capacity": 60},
}


def drawn_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.array([random.Random(seed + number).randint(1, 60) for number in range(count)])


def epoch_of(sampler: Sampler, epoch: int) -> list[list[list[list[int]]]]:
    """Rows by step, micro-batch and rank."""
    return [
        [
            [sampler.micro_batch(epoch, step, rank, number).tolist() for rank in range(sampler.shape.world_size)]
            for number in range(sampler.micro_batches(step))
        ]
        for step in range(sampler.steps_per_epoch)
    ]


def rows_of(step: list[list[list[int]]]) -> list[int]:
    return [row for micro_batch in step for rows in micro_batch for row in rows]


@given(
    count=st.integers(1, 70),
    rows=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    ranks=st.integers(1, 5),
    epoch=st.integers(0, 3),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_every_row_comes_once_an_epoch_and_none_twice(count, rows, accumulation, ranks, epoch, kind):
    lengths, shape = drawn_lengths(count), BatchShape(rows, accumulation, ranks)
    sampler = Sampler(lengths, shape, seed=3, **KINDS[kind])
    steps = epoch_of(sampler, epoch)

    assert sorted(row for step in steps for row in rows_of(step)) == list(range(count))
    assert sum(map(len, steps)) == sampler.micro_batches_per_epoch
    for number, step in enumerate(steps):
        assert sorted(rows_of(step)) == sorted(sampler.step_rows(epoch, number))
        assert step and (number == len(steps) - 1 or len(step) == accumulation)
        for micro_batch in step:
            assert any(micro_batch), "no rank has anything to do"
            for found in micro_batch:
                if sampler.capacity is None:
                    assert len(found) <= rows
                elif sampler.batching == "padded" and rows == 1:
                    assert len(found) * lengths[found].max(initial=0) <= sampler.capacity
                else:
                    assert lengths[found].sum() <= rows * sampler.capacity or sampler.batching == "padded"


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_step_do_not_depend_on_what_makes_it_up(kind):
    lengths = drawn_lengths(101)
    per_shape = []
    for shape in SHAPES:
        sampler = Sampler(lengths, shape, seed=5, **KINDS[kind])
        per_shape.append([sorted(rows_of(step)) for step in epoch_of(sampler, 2)])
    assert len(per_shape[0]) > 2
    assert all(steps == per_shape[0] for steps in per_shape)


def test_epochs_and_seeds_differ_and_nothing_else_does():
    lengths = drawn_lengths(40)
    first, again, other_seed = (Sampler(lengths, BatchShape(4, 1, 2), seed=seed) for seed in (1, 1, 2))
    assert epoch_of(first, 0) == epoch_of(again, 0) != epoch_of(first, 1)
    assert epoch_of(first, 0) != epoch_of(other_seed, 0)
    backwards = [
        first.micro_batch(0, step, rank, 0).tolist() for step in (4, 0) for rank in (1, 0)
    ]  # in any order of asking
    assert backwards == [again.micro_batch(0, step, rank, 0).tolist() for step in (4, 0) for rank in (1, 0)]
    ordered = Sampler(lengths, BatchShape(4, 1, 2), seed=1, order="sequential")
    assert [sorted(rows_of(step)) for step in epoch_of(ordered, 7)][:2] == [list(range(8)), list(range(8, 16))]


def test_the_order_stays_what_it_is_for_ever():
    """A run that is resumed with another version of any library goes on in the same order."""
    assert shuffled(10, 42, 0).tolist() == [3, 5, 8, 6, 0, 2, 4, 9, 7, 1]
    assert shuffled(10, 42, 1).tolist() == [9, 1, 5, 7, 2, 4, 8, 3, 6, 0]
    counts = Counter(int(shuffled(5, seed, 0)[0]) for seed in range(2000))
    assert all(320 < counts[number] < 480 for number in range(5))


ORDERS = {
    "flat": "68c775ea37d72999",
    "padded": "47b91b4223092ed3",
    "by length": "16b67859c98b7105",
    "sequential": "82ba4e976209ce41",
    "packed": "2dd6fbae6fa3359a",
    "budget": "a44171171f8ea48d",
    "padded budget": "7ed6309447b5d8c8",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_order_stays_what_it_is_for_ever(kind):
    """Micro-batches of whole epochs, by digest: of whoever changes one, a run that is resumed learns rows twice."""
    sampler = Sampler(drawn_lengths(1203, seed=7), BatchShape(2, 3, 2), seed=11, **KINDS[kind])
    found = json.dumps([epoch_of(sampler, epoch) for epoch in (0, 3)])
    assert hashlib.blake2b(found.encode(), digest_size=8).hexdigest() == ORDERS[kind]


def test_ranks_get_alike():
    lengths = drawn_lengths(400)
    sampler = Sampler(lengths, BatchShape(4, 2, 4), seed=0)
    for step in epoch_of(sampler, 0)[:-1]:
        for micro_batch in step:
            tokens = [lengths[rows].sum() for rows in micro_batch]
            assert max(tokens) - min(tokens) <= lengths.max()
    firsts = [[lengths[rows].sum() for rows in step[0]] for step in epoch_of(sampler, 0)]
    seconds = [[lengths[rows].sum() for rows in step[1]] for step in epoch_of(sampler, 0)[:-1]]
    assert all(tokens == sorted(tokens, reverse=True) for tokens in firsts)
    assert all(tokens == sorted(tokens) for tokens in seconds)  # no rank always has the most


@pytest.mark.parametrize(("ranks", "rows", "count"), [(64, 4, 256), (64, 4, 200), (256, 8, 2048), (32, 2, 64)])
def test_many_ranks_get_as_alike_as_if_each_row_went_to_the_emptiest(ranks, rows, count):
    lengths = np.clip(np.random.default_rng(count).lognormal(5.3, 0.8, count).astype(int), 8, 2048)
    bins = [(0, number, 0) for number in range(ranks)]
    full = []
    for length in sorted(lengths, reverse=True):
        tokens, number, held = heapq.heappop(bins)
        heapq.heappush(bins, (tokens + length, number, held + 1)) if held + 1 < rows else full.append(tokens + length)
    largest = max([tokens for tokens, _, _ in bins] + full)
    (micro_batch,) = epoch_of(Sampler(lengths, BatchShape(rows, 1, ranks), seed=0), 0)[0]
    assert max(lengths[rows].sum() for rows in micro_batch) <= 1.03 * largest


def test_a_short_last_step_can_be_left_out():
    lengths = drawn_lengths(21)
    whole, dropped = (Sampler(lengths, BatchShape(2, 2, 2), seed=0, drop_last=drop) for drop in (False, True))
    assert (whole.steps_per_epoch, dropped.steps_per_epoch) == (3, 2)
    assert epoch_of(dropped, 0) == epoch_of(whole, 0)[:2]
    assert whole.position(7) == (2, 1)
    none = Sampler(lengths[:7], BatchShape(2, 2, 2), seed=0, drop_last=True)
    assert (none.steps_per_epoch, none.micro_batches_per_epoch) == (0, 0)
    with pytest.raises(IndexError):
        dropped.step_rows(0, 2)


def test_rows_of_like_length_pad_less():
    drawn = np.random.default_rng(0)
    lengths = np.clip(drawn.lognormal(5, 0.9, 4000).astype(int), 8, 2048)
    by_length = Sampler(lengths, BatchShape(8, 1, 1), seed=0, batching="padded", order="group_by_length")
    at_random = Sampler(lengths, BatchShape(8, 1, 1), seed=0, batching="padded")
    assert padding_share(by_length) < 0.05 < 0.4 < padding_share(at_random)
    in_step = Sampler(lengths, BatchShape(8, 4, 4), seed=0, batching="padded")
    assert padding_share(in_step) < 0.2  # within a step rows lie by length anyway


def test_a_row_that_is_longer_than_the_capacity_is_refused():
    with pytest.raises(ValueError, match="do not fit a capacity of 10"):
        Sampler(np.array([5, 11]), BatchShape(1, 1, 1), seed=0, capacity=10)
