"""Base against tuned, pair by pair, and how sure the difference is. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES, SEED = 1000, 0
CONFIDENCE = 0.95
Interval = tuple[float, float] | None


def ratio_interval(sums: Sequence[float], weights: Sequence[float]) -> Interval:
    """The 95 % bootstrap interval of sum(sums) / sum(weights), rows drawn with replacement (Efron, 1979, percentiles).

    None for fewer than two rows, of which nothing can be said. The same rows give the same interval.
    """
    tops, bottoms = np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if len(tops) < 2:
        return None
    drawn = np.random.default_rng(SEED)
    found = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        rows = drawn.integers(len(tops), size=len(tops))
        found[number] = tops[rows].sum() / bottoms[rows].sum()
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> Interval:
    """The same of a mean."""
    return ratio_interval(values, [1.0] * len(values))


def exact_mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: pairs that only the first, and only the second, has right (McNemar, 1947).

    Under no difference each such pair falls to either side like a fair coin.
    """
    pairs, fewer = only_first + only_second, min(only_first, only_second)
    if pairs == 0:
        return 1.0
    tail = sum(math.comb(pairs, number) for number in range(fewer + 1)) / 2**pairs
    return min(1.0, 2 * tail)


def perplexity(loss: float) -> float:
    """exp(loss), without overflow."""
    return math.exp(loss) if loss < 700 else math.inf
