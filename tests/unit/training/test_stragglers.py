"""Which rank is slow, and how often that is said."""

import pytest

from finetune.training.step_monitor import Stragglers, find_straggler


@pytest.mark.parametrize(
    ("own", "step", "named"),
    [
        ([0.01, 0.26], 0.3, 1),
        ([0.26, 0.01, 0.02], 0.3, 0),
        ([0.01, 0.05], 0.06, None),  # under 50 ms
        ([1.0, 1.1], 1.2, None),  # under a fifth of the step
        ([0.2, 0.2, 0.2], 0.3, None),
        ([0.5], 0.6, None),
    ],
)
def test_a_rank_is_slow_when_it_costs_50_ms_and_a_fifth(own, step, named):
    found = find_straggler([[one] * 10 for one in own], [step] * 10)
    assert (found.rank if found else None) == named
    if found:
        assert found.cost == pytest.approx(max(own) - sorted(own)[len(own) // 2 - 1], abs=0.02)


def test_one_slow_step_is_not_a_slow_rank_and_nobody_is_named_twice_soon():
    assert find_straggler([[0.01] * 10, [0.01] * 9 + [9.0]], [0.1] * 10) is None
    watch = Stragglers()
    said = [step for step in range(1, 1101) if watch.add([0.01, 0.21], 0.25)]
    assert said == [10, 510, 1010]
    changed = [(step, found.rank) for step in range(1101, 1131) if (found := watch.add([0.51, 0.01], 0.6))]
    assert [rank for _, rank in changed] == [0]
