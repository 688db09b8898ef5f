"""Groups that fill a number of tokens: whole, within it, and each length in the fullest group that takes it."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.dataset.packing import Fill, Groups, best_fit_decreasing, rectangles

CAPACITY = 50
lengths_up_to_capacity = st.lists(st.integers(1, CAPACITY), max_size=60)


def pack(lengths: list[int], fill: Fill, capacity: int = CAPACITY) -> list[list[int]]:
    groups = Groups.pack(np.array(lengths, dtype=np.int64), capacity, fill, [np.arange(len(lengths))])
    return [groups.rows_of(np.array([number])).tolist() for number in range(len(groups))]


def longest_first(lengths: list[int]) -> list[int]:
    return [index for _, index in sorted((-length, index) for index, length in enumerate(lengths))]


def naive_best_fit(lengths: list[int]) -> list[list[int]]:
    """The definition, by looking at every group for every length; what was touched last stands last."""

    def tokens(group: list[int]) -> int:
        return sum(lengths[index] for index in group)

    groups: list[list[int]] = []
    for index in longest_first(lengths):
        taking = [group for group in groups if tokens(group) + lengths[index] <= CAPACITY]
        fullest = [group for group in taking if tokens(group) == max(map(tokens, taking))]
        chosen = fullest[-1] if fullest else []
        groups = [group for group in groups if group is not chosen] + [[*chosen, index]]
    return sorted(groups, key=lambda group: longest_first(lengths).index(group[0]))


def naive_rectangles(lengths: list[int]) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for index in longest_first(lengths):
        grown = [*groups[-1], index]
        if len(grown) * lengths[grown[0]] <= CAPACITY:
            groups[-1] = grown
        else:
            groups.append([index])
    return groups if lengths else []


@given(lengths_up_to_capacity)
def test_every_length_is_in_one_group_and_no_group_overflows(lengths):
    for fill in (best_fit_decreasing, rectangles):
        groups = pack(lengths, fill)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        assert all(groups)
    assert all(sum(lengths[index] for index in group) <= CAPACITY for group in pack(lengths, best_fit_decreasing))
    for group in pack(lengths, rectangles):
        assert len(group) * max(lengths[index] for index in group) <= CAPACITY


@given(lengths_up_to_capacity)
def test_they_are_what_their_definitions_say(lengths):
    """To the last index, and in this order: a run that goes on with another version meets the same groups."""
    assert pack(lengths, best_fit_decreasing) == naive_best_fit(lengths)
    assert pack(lengths, rectangles) == naive_rectangles(lengths)


@given(lengths_up_to_capacity)
def test_few_groups_are_more_than_needed(lengths):
    fewest = math.ceil(sum(lengths) / CAPACITY)
    big = sum(length > CAPACITY // 2 for length in lengths)
    assert max(fewest, big) <= len(pack(lengths, best_fit_decreasing)) <= 11 / 9 * max(2 * fewest, big) + 6 / 9


def test_real_lengths_fill_their_groups():
    drawn = random.Random(0)
    lengths = [max(8, min(2048, int(drawn.lognormvariate(5.3, 0.8)))) for _ in range(5000)]
    assert sum(lengths) / (2048 * len(pack(lengths, best_fit_decreasing, 2048))) > 0.99


@pytest.mark.parametrize("fill", [best_fit_decreasing, rectangles])
@pytest.mark.parametrize("lengths", [[5, 51], [0, 5]])
def test_lengths_that_fit_no_group_are_refused(fill, lengths):
    with pytest.raises(ValueError, match="do not fit a capacity of 50"):
        pack(lengths, fill)
