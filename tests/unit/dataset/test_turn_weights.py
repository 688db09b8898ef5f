"""Which turns are supervised, and with which weight."""

from typing import Any

import pytest

from finetune.dataset.conversation_reader import read_conversations
from tests.helpers.chat_rows import faults, turns, written


def with_train(*pairs: tuple[str, Any]) -> dict:
    return {"conversations": [{"from": role, "value": role, "train": train} for role, train in pairs]}


def test_a_model_turn_can_be_context_only(tmp_path):
    path = written(
        tmp_path / "a.json",
        [
            with_train(
                ("human", False), ("model", False), ("human", None), ("model", True), ("human", None), ("bot", None)
            )
        ],
    )

    (one,) = read_conversations(path)

    assert [turn.train for turn in one.turns] == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (with_train(("human", True), ("model", True)), 'row 0, turn 0: has "train": true, but only model turns are'),
        (with_train(("human", None), ("model", 1)), 'row 0, turn 1: expected "train" to be true or false, found 1'),
        (
            with_train(("human", None), ("model", "no")),
            'row 0, turn 1: expected "train" to be true or false, found "no"',
        ),
        (with_train(("human", None), ("model", False)), 'row 0: every model turn is "train": false'),
    ],
)
def test_a_train_that_says_nothing_sensible_is_refused(row, said, tmp_path):
    path = written(tmp_path / "a.json", [row])

    (fault,) = faults(path)
    assert fault.startswith(f"{path}, {said}")


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss", "loss_scale"])
@pytest.mark.parametrize(
    ("value", "is_supervised", "weight"),
    [(0, False, 1), (False, False, 1), (1, True, 1), (True, True, 1), (0.5, True, 0.5)],
)
def test_a_model_turn_has_a_weight(key, value, is_supervised, weight, tmp_path):
    row = turns(("human", "a"), ("model", "b"), ("human", "c"), ("model", "d"))
    row["conversations"][1][key] = value
    row["conversations"][0][key] = 0
    (one,) = read_conversations(written(tmp_path / "a.json", [row]))

    assert (one.turns[1].train, one.turns[1].weight) == (is_supervised, weight)
    assert all(turn.train and turn.weight == 1 for turn in (one.turns[0], *one.turns[2:]))


@pytest.mark.parametrize(
    ("turn", "values", "said"),
    [
        (1, {"weight": -1}, 'turn 1: expected "weight" to be a number of 0 or more'),
        (1, {"loss": "no"}, 'turn 1: expected "loss" to be a number of 0 or more'),
        (1, {"weight": 0, "train": True}, "say different things"),
        (1, {"weight": 0.5, "loss_scale": 2}, "say different things"),
        (0, {"weight": 0.5}, "only model turns are supervised"),
        (0, {"loss": True}, "only model turns are supervised"),
    ],
)
def test_weights_that_say_nothing_sensible_are_refused(turn, values, said, tmp_path):
    row = turns(("human", "a"), ("model", "b"))
    row["conversations"][turn] |= values

    fault, *_ = faults(written(tmp_path / "a.json", [row]))
    assert said in fault


def test_turns_that_differ_in_what_is_learned_differ(tmp_path):
    rows = [with_train(("model", one), ("human", None), ("model", True)) for one in (True, False)]

    assert len(read_conversations(written(tmp_path / "a.json", rows))) == 2
