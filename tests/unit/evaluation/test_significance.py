"""Intervals and exact tests against other ways to the same numbers."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.evaluation.significance import exact_mcnemar, perplexity, ratio_interval, score_interval


def mean_interval(values):
    return ratio_interval(values, [1.0] * len(values))


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_share_of_coin_throws_at_least_as_uneven(first, second):
    pairs = first + second
    uneven = sum(
        abs(2 * bin(throws).count("1") - pairs) >= abs(first - second) for throws in range(2 ** min(pairs, 12))
    )
    if pairs <= 12:
        assert exact_mcnemar(first, second) == pytest.approx(uneven / 2**pairs)
    assert exact_mcnemar(first, second) == exact_mcnemar(second, first) <= 1


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    drawn, covered = random.Random(0), 0
    for _ in range(100):
        low, high = mean_interval([drawn.gauss(1, 2) for _ in range(60)])
        covered += low <= 1 <= high
    assert 88 <= covered <= 100


def test_an_interval_is_about_as_wide_as_the_formula_says():
    drawn = random.Random(1)
    values = [drawn.gauss(0, 1) for _ in range(400)]
    low, high = mean_interval(values)
    deviation = math.sqrt(sum((one - sum(values) / 400) ** 2 for one in values) / 400)
    assert high - low == pytest.approx(2 * 1.96 * deviation / 20, rel=0.1)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 50)), min_size=2, max_size=20))
def test_an_interval_is_the_same_each_time_and_lies_among_the_rows(rows):
    sums, weights = [value * weight for value, weight in rows], [weight for _, weight in rows]
    low, high = ratio_interval(sums, weights)
    assert [low, high] == ratio_interval(sums, weights)
    assert min(value for value, _ in rows) - 1e-9 <= low <= high <= max(value for value, _ in rows) + 1e-9


def test_of_one_row_nothing_is_said():
    assert mean_interval([1.0]) is None


def test_a_perplexity_that_no_float_holds_is_infinite():
    assert perplexity(math.log(20)) == pytest.approx(20) and perplexity(1e4) == math.inf


@pytest.mark.parametrize(
    ("counts", "interval"),
    [((12, 2, 50), (0.0611, 0.3447)), ((0, 0, 244), (-0.0155, 0.0155)), ((0, 244, 244), (-1, -0.9690))],
)
def test_the_score_interval_is_the_published_one_and_has_a_width_where_pairs_are_alike(counts, interval):
    assert score_interval(*counts) == pytest.approx(interval, abs=1e-4)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 300))
def test_the_score_interval_turns_with_the_pairs(first, second, pairs):
    low, high = score_interval(first, second, pairs)
    assert low < (first - second) / pairs < high
    assert score_interval(second, first, pairs) == pytest.approx([-high, -low])
