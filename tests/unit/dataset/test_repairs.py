"""Repairs of rows: made by name alone, and said."""

import pytest

from finetune.conversation import BadRow
from tests.helpers.chat_rows import faults, read, spoken, turns, written

REPAIRED = [
    ("merge_turns", "hhm", [("human", "0\n\n1"), ("model", "2")], ("merge_turns: turns 0 and 1",)),
    ("merge_turns", "hmmmh", None, ()),
    ("merge_turns", "sshhm", [("system", "0\n\n1"), ("human", "2\n\n3"), ("model", "4")],
     ("merge_turns: turns 0 and 1", "merge_turns: turns 2 and 3")),
    ("merge_turns", "hmmm", [("human", "0"), ("model", "1\n\n2\n\n3")], ("merge_turns: turns 1, 2 and 3",)),
    ("merge_turns", "hm", [("human", "0"), ("model", "1")], ()),
    ("drop_last_human", "hmh", [("human", "0"), ("model", "1")], ("drop_last_human: turn 2",)),
    ("drop_last_human", "hmhh", None, ()),
    ("drop_last_human", "h", None, ()),
    ("drop_last_human merge_turns", "hmhh", [("human", "0"), ("model", "1")],
     ("merge_turns: turns 2 and 3", "drop_last_human: turn 2")),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "roles", "expected", "done"), REPAIRED)
def test_repairs_happen_by_name_alone_and_are_said(rules, roles, expected, done, tmp_path):
    names = {"h": "human", "m": "model", "s": "system"}
    path = written(tmp_path / "a.json", [turns(*((names[role], str(number)) for number, role in enumerate(roles)))])

    (repaired,) = read(path, repairs=rules.split())

    if expected is None:
        assert isinstance(repaired, BadRow)
    else:
        assert (spoken(repaired), repaired.repairs) == (expected, done)
        assert not done or faults(path)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"train": False}, 'merge the two (their "train" differ)'),
        ({"weight": 0.5}, 'merge the two (their "weight" differ)'),
        ({"weight": 0}, 'merge the two (their "train" differ)'),
        ({"reasoning": "r"}, "merge the two"),
    ],
)
def test_turns_that_differ_in_more_than_their_text_are_not_merged(values, remedy, tmp_path):
    row = turns(("human", "a"), ("model", "b"), ("model", "c"))
    row["conversations"][1] |= values
    (fault,) = faults(written(tmp_path / "a.json", [row]), repairs=["merge_turns"])
    assert fault.endswith(f"row 0, turn 2: a second model turn in a row: {remedy}")
