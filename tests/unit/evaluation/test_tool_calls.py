"""Counts of tool calls: valid, right tool, right arguments, and calls where the data has none; as a table."""

import json

import pytest

from finetune.conversation import Conversation, ToolCall, Turn
from finetune.dataset.data_sources import find_sources
from finetune.evaluation.tool_calls import ToolTurn, count_calls, rows_with_tools
from finetune.run_dir.eval_results import held_out_section

TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}
    for name in ("f", "g")
)  # fmt: skip
ASKED = Conversation((Turn("human", "?"),), tools=TOOLS)


def calls(*pairs):
    return Turn("model", "", tool_calls=tuple(ToolCall(name, arguments) for name, arguments in pairs))


def counts(expected, answer):
    return [*count_calls([ToolTurn(ASKED, 1, expected, [1], 1)], [answer]).values()]


@pytest.mark.parametrize(
    ("answer", "counted"),
    [
        (calls(("f", {"x": 1})), [1, 1, 1, 0]),
        (calls(("f", {"x": 2})), [1, 1, 0, 0]),
        (calls(("g", {"x": 1})), [1, 0, 0, 0]),
        (calls(("f", {"x": "1"})), [0, 0, 0, 0]),
        (calls(("h", {"x": 1})), [0, 0, 0, 0]),
        (calls(("f", {"x": 1}), ("f", {"x": 1})), [1, 0, 0, 0]),
        (Turn("model", 'f({"x": 1})'), [0, 0, 0, 0]),
    ],
)
def test_answers_to_a_turn_that_calls(answer, counted):
    assert counts(calls(("f", {"x": 1})), answer) == counted


def test_parallel_calls_may_come_in_any_order():
    assert counts(calls(("f", {"x": 1}), ("g", {"x": 2})), calls(("g", {"x": 2}), ("f", {"x": 1}))) == [1, 1, 1, 0]


def test_a_call_where_the_data_has_none():
    assert counts(Turn("model", "No."), calls(("f", {"x": 1}))) == [0, 0, 0, 1]
    assert counts(Turn("model", "No."), Turn("model", "Yes.")) == [0, 0, 0, 0]


def test_rows_are_read_up_to_the_limit_and_only_if_they_hold_calls(tmp_path):
    turns = [
        {"from": "human", "value": "?"},
        {"from": "model", "value": "", "tool_calls": {"name": "f", "arguments": {"x": 1}}},
    ]
    plain = {"conversations": [{"from": "human", "value": "!"}, {"from": "model", "value": "No."}]}
    rows = [
        plain,
        *({"tools": [*TOOLS], "conversations": [{"from": "human", "value": f"{n}"}, turns[1]]} for n in range(3)),
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    found = rows_with_tools(find_sources([str(path)]), (), 2)
    assert [row.row for row in found] == [1, 2] and rows_with_tools(find_sources([str(path)]), (), 0) == []
    path.write_text(json.dumps([plain, {"tools": [*TOOLS], **plain, "id": 1}]))
    assert rows_with_tools(find_sources([str(path)]), ("drop_duplicates",), 2) == []


def test_the_table_has_shares_of_both_models():
    document = {
        "data": {"rows": 2, "tokens": 5, "not_measured": 0}, "non_finite": [], "worst": [], "worsened": [],
        "verdict": "v",
        "groups": [{"name": "all", "rows": 2, "tokens": 5, "tuned": {"loss": 1.0, "perplexity": 2.7}}],
        "tool_calls": {
            "rows": 2, "with_call": 4, "without_call": 0, "left_out": 1,
            "counts": {"base": {"valid": 1, "right_name": 1, "right_arguments": 0, "false_calls": 0},
                       "tuned": {"valid": 4, "right_name": 3, "right_arguments": 2, "false_calls": 0}},
        },
    }  # fmt: skip
    section = held_out_section(document)
    assert section.tables[1].head == ["", "turns", "base", "tuned"]
    assert [row[1:] for row in section.tables[1].rows] == [
        ["4", "25.0%", "100.0%"], ["4", "25.0%", "75.0%"], ["4", "0.0%", "50.0%"],
    ]  # fmt: skip
    assert any("1 turns are too long" in note for note in section.notes)
