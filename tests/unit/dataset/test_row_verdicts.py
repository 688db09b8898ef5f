"""Rows and turns that say how good their answer is: bad answers are refused, other meanings of the keys are not."""

import pytest

from finetune.dataset.row_reading import RowReading
from finetune.dataset.row_verdicts import VERDICT_KEYS
from tests.helpers.chat_rows import good_row

BAD = [
    ("label", False), ("label", 0), ("label", -1), ("label", "false"), ("label", " Bad "), ("label", "0"),
    ("label", "rejected"), ("kto_tag", False), ("kto_tag", "false"), ("rejected", True), ("rejected", 1),
    ("chosen", False), ("chosen", 0), ("bad", True), ("bad", "yes"), ("is_correct", False), ("train", False),
    ("weight", 0), ("feedback", "thumbs-down"), ("quality", "very poor"), ("rating", "bad"), ("score", 0.3),
    ("score", 5), ("score", "4"), ("reward", -1.5), ("rating", 1), ("reward", False),
    ("finish_reason", "length"), ("stopReason", "max_tokens"), ("finishReason", "MAX_TOKENS"), ("status", "incomplete"),
    ("truncated", True), ("isTruncated", 1), ("flagged", True), ("completed", False), ("quality", 5), ("loss", False),
]  # fmt: skip
FINE = [
    ("label", True), ("label", 1), ("label", None), ("label", "sports"), ("label", "negative"), ("label", {"a": 0}),
    ("label", ["x"]), ("label", ""), ("kto_tag", True), ("rejected", False), ("chosen", True), ("bad", False),
    ("bad", 0), ("weight", 1), ("train", True), ("score", None), ("score", [0.1]), ("metadata", {"score": 0.1}),
    ("quality", "good"), ("correct", "B"), ("skip_prompt_formatting", False), ("rejected", ""), ("success", 1.0),
    ("finish_reason", "stop"), ("stop_reason", "end_turn"), ("status", "completed"), ("flagged", False),
    ("label", "length"),
]  # fmt: skip
OF_ROWS_ONLY = ("train", "weight", "loss")


def read(row: dict, **options: bool) -> RowReading:
    return RowReading(row, "a.json, row 0", **options)


def rows_with(key: str, value: object) -> list[dict]:
    """The key in a row of turns, in a row of one answer, in a model turn."""
    human, model = good_row(0)["conversations"]
    rows = [{**good_row(0), key: value}, {"prompt": "a", "response": "b", key: value}]
    return rows if key in OF_ROWS_ONLY else [*rows, {"conversations": [human, {**model, key: value}]}]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_an_answer_that_is_called_bad_is_refused(key, value):
    for row in rows_with(key, value):
        reading = read(row)
        assert len(reading.faults) == 1 and f'"{key}"' in reading.faults[0] and reading.is_complete
        assert read(row, ignores_verdicts=True).faults == []


@pytest.mark.parametrize(("key", "value"), FINE)
def test_other_values_and_other_meanings_are_read(key, value):
    is_named = key not in VERDICT_KEYS or (isinstance(value, str | list | dict) and bool(value))
    for row in rows_with(key, value):
        reading = read(row)
        assert reading.faults == [] and [key in name for name in reading.unread] == [True] * is_named


def test_a_human_turn_may_be_called_what_it_likes():
    human, model = good_row(0)["conversations"]
    assert read({"conversations": [{**human, "label": False}, model]}).faults == []


@pytest.mark.parametrize("value", [None, "", " ", [], {}, "[]", "null", "{}", False])
def test_an_empty_list_of_tools_is_no_tool(value):
    assert [fault for row in rows_with("tools", value) for fault in read(row).faults] == []
