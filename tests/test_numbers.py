"""Numbers that are not finite, slow ranks, requests to stop: what real ranks agree on at the end of a step."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from finetune import numbers, skipping
from finetune.arguments import parse
from finetune.errors import ConfigError
from finetune.numbers import GRADIENT, LEFT_OUT, LOSS, SEARCH, Count, Scale, Stragglers, bits_of, find_straggler


def test_what_was_found_is_told_apart():
    nan, inf = math.nan, math.inf
    assert bits_of([1.0, 2.0], 0.5, left_out=False, scale=None) == 0
    assert bits_of([1.0, nan], 0.5, left_out=False, scale=None) == LOSS
    assert bits_of([-inf], inf, left_out=True, scale=None) == LOSS | GRADIENT | LEFT_OUT
    assert bits_of([1.0], None, left_out=True, scale=Scale(65536, 1)) == LEFT_OUT | SEARCH
    assert bits_of([1.0], inf, left_out=True, scale=Scale(1, 1)) == GRADIENT | LEFT_OUT
    assert numbers.is_finite([0, 0]) and not numbers.is_finite([0, LEFT_OUT])
    search = LEFT_OUT | SEARCH | GRADIENT
    assert numbers.is_search([search, search])
    assert not numbers.is_search([search, search | LOSS]) and not numbers.is_search([LEFT_OUT | GRADIENT, 0])


def test_deepspeeds_own_scaler_searches_and_then_gives_up(monkeypatch):
    """Its loss scale comes down from 8 to 1, and at 1 it raises a plain Exception."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it only asks who prints
    scaler = loss_scaler.DynamicLossScaler(8, 1000, 1, 1, False)
    found = []
    with pytest.raises(Exception, match="minimum") as raised:
        for _ in range(9):
            before = Scale(scaler.cur_scale, scaler.min_scale)
            scaler.update_scale(True)
            found.append(bits_of([2.0], math.inf, left_out=True, scale=before))
    assert [numbers.is_search([one]) for one in found] == [True, True, True]
    assert numbers.is_of_the_least_scale(raised.value) and not numbers.is_of_the_least_scale(RuntimeError("other"))


def test_three_in_a_row_or_more_than_one_percent_end_a_run():
    count = Count()
    assert count.add(1, 9000) is None and count.add(2, 9000) is None
    assert "last 3 steps" in count.add(3, 9000)
    spread = Count()
    for step in (100, 200):
        spread.in_a_row = 0
        assert spread.add(step, 9000) is None
    spread.in_a_row = 0
    assert spread.add(300, 9000) is None  # 3 of 300: one per cent, not more
    spread.in_a_row = 0
    assert "4 of 399 steps" in spread.add(399, 9000)
    assert "no step of the run" in Count().add(1, 1) and Count().add(2, 2) is None


def test_a_mean_is_over_the_steps_with_a_loss():
    count = Count(lost_since_log=1)
    assert Count().mean_without(0.1, 3) == 0.1
    assert count.mean_without(2.0, 4) == pytest.approx(8 / 3)
    assert math.isnan(count.mean_without(0.0, 1))


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


DATA = {"a/rows.json": 20, "owner/name:train": 3}


def test_rows_to_skip_are_read_in_both_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "skip"
    record = json.dumps({"source": "a/rows.json", "row": 3, "id": "x", "text": "é", "loss": None})
    path.write_text(f"# a remark\n\n{record}\n{record}\na/rows.json:17\n{tmp_path}/a/rows.json:0\nowner/name:train:2\n")
    rows = skipping.rows_to_skip([str(path)], DATA)
    assert rows == (("a/rows.json", 0), ("a/rows.json", 3), ("a/rows.json", 17), ("owner/name:train", 2))
    assert skipping.rows_to_skip([], DATA) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a/rows.json:20", "a/rows.json has rows 0 to 19"),
        ("a/rows.json:-1", "a/rows.json:-1"),
        ("b.json:1", "b.json is not among the data"),
        ("a/rows.json", "line 1: a/rows.json: expected path/to/data.json:17"),
        ('{"source": "a/rows.json"}', "expected path/to/data.json:17"),
        ('{"source": 7, "row": 1}', "expected path/to/data.json:17"),
        ('{"source": "a/rows.json", "row": 1.5}', "expected path/to/data.json:17"),
        ("{broken", "expected path/to/data.json:17"),
    ],
)
def test_a_row_that_the_data_does_not_have_is_named(tmp_path, text, says):
    (tmp_path / "skip").write_text(text + "\n")
    with pytest.raises(ConfigError) as raised:
        skipping.rows_to_skip([str(tmp_path / "skip")], DATA)
    assert says in str(raised.value) and "--skip_rows" in str(raised.value)


def test_a_file_of_rows_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--skip_rows .*nowhere: No such file"):
        skipping.rows_to_skip([str(tmp_path / "nowhere")], DATA)


def test_all_windows_of_a_row_are_left_out():
    from datasets import Dataset

    examples = Dataset.from_dict({"source": ["a", "a", "b", "a"], "row": [0, 1, 1, 1], "id": ["0", "1", '"x"', "1"]})
    assert skipping.places_of(examples, [("a", 1)]).tolist() == [False, True, False, True]
    assert not skipping.places_of(examples, []).any()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--learning_rate", "0"), "--learning_rate 0: nothing would be learned"),
        (("--learning_rate", "-0.001"), "--learning_rate -0.001: nothing would be learned"),
        (("--learning_rate", "nan"), "--learning_rate nan: nothing would be learned"),
        (("--num_train_epochs", "0"), "--num_train_epochs 0: no step would be made"),
    ],
)
def test_a_run_that_could_learn_nothing_does_not_start(flags, says):
    base = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
    with pytest.raises(ConfigError) as raised:
        parse([*base, *flags])
    assert says in str(raised.value)
    assert parse([*base, "--num_train_epochs", "0", "--max_steps", "3"]).given("max_steps") == 3


def test_a_model_without_a_trained_parameter_is_refused():
    import torch

    from finetune import planning

    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    batch = SimpleNamespace(sequence_parallel_size=1)
    with pytest.raises(ConfigError, match="no parameter of this model would be trained"):
        planning.settle(SimpleNamespace(batch=batch), None, None, frozen, None, None)
