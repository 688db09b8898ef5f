"""Numbers that are not finite: what is decided of a step, and when they end a run."""

import math

import pytest

from finetune.training import nonfinite
from finetune.training.nonfinite import GRADIENT, LEFT_OUT, LOSS, SEARCH, LossScale, NonFiniteCounter, finite_flags
from finetune.utils.errors import ConfigError


def test_what_was_found_is_told_apart():
    nan, inf = math.nan, math.inf
    assert finite_flags([1.0, 2.0], 0.5, left_out=False, scale=None) == 0
    assert finite_flags([1.0, nan], 0.5, left_out=False, scale=None) == LOSS
    assert finite_flags([-inf], inf, left_out=True, scale=None) == LOSS | GRADIENT | LEFT_OUT
    assert finite_flags([1.0], None, left_out=True, scale=LossScale(65536, 1)) == LEFT_OUT | SEARCH
    assert finite_flags([1.0], inf, left_out=True, scale=LossScale(1, 1)) == GRADIENT | LEFT_OUT
    search = LEFT_OUT | SEARCH | GRADIENT
    assert nonfinite.is_loss_scale_search([search, search])
    assert not nonfinite.is_loss_scale_search([search, search | LOSS]) and not nonfinite.is_loss_scale_search(
        [LEFT_OUT | GRADIENT, 0]
    )


def test_deepspeeds_own_scaler_searches_and_then_gives_up(monkeypatch):
    """Its loss scale comes down from 8 to 1, and at 1 it raises a plain Exception."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it only asks who prints
    scaler = loss_scaler.DynamicLossScaler(8, 1000, 1, 1, False)
    found = []
    with pytest.raises(Exception, match="minimum") as raised:
        for _ in range(9):
            before = LossScale(scaler.cur_scale, scaler.min_scale)
            scaler.update_scale(True)
            found.append(finite_flags([2.0], math.inf, left_out=True, scale=before))
    assert [nonfinite.is_loss_scale_search([one]) for one in found] == [True, True, True]
    assert nonfinite.MINIMUM_SCALE_ERROR in str(raised.value)


def test_three_in_a_row_or_more_than_one_percent_end_a_run():
    count = NonFiniteCounter()
    assert count.add(1, 9000) is None and count.add(2, 9000) is None
    assert "last 3 steps" in count.add(3, 9000)
    spread = NonFiniteCounter()
    for step in (100, 200):
        spread.in_a_row = 0
        assert spread.add(step, 9000) is None
    spread.in_a_row = 0
    assert spread.add(300, 9000) is None  # 3 of 300: one per cent, not more
    spread.in_a_row = 0
    assert "4 of 399 steps" in spread.add(399, 9000)
    assert "no step of the run" in NonFiniteCounter().add(1, 1) and NonFiniteCounter().add(2, 2) is None


def test_a_mean_is_over_the_steps_with_a_loss():
    count = NonFiniteCounter(lost_since_log=1)
    assert NonFiniteCounter().mean_without(0.1, 3) == 0.1
    assert count.mean_without(2.0, 4) == pytest.approx(8 / 3)
    assert math.isnan(count.mean_without(0.0, 1))


def test_a_model_without_a_trained_parameter_is_refused():
    import torch

    from finetune.training.dataloaders import build_dataloaders

    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of this model would be trained"):
        build_dataloaders(None, frozen, None, None, torch.device("cpu"), None)
