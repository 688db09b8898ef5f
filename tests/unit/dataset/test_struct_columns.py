"""Calls, results and declarations in struct columns of tables, which have the keys of all rows."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import find_sources
from tests.helpers.chat_rows import read, written

PROPERTIES = {
    "city": {"type": "string"},
    "unit": {"type": ["string", "null"]},
    "note": {"type": ["string", "null"]},
    "where": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}},
}
DECLARED = [
    {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES, "required": ["note"]}},
    {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": 0}}}},
]
# With "note", which is required, as null; without "unit", which may be null.
ARGUMENTS = [{"city": "Oslo", "note": None, "where": {"x": 1}}, {"a": 1}, {"note": "n", "unit": "C", "where": {"y": 2}}]


def calls_of(style: str) -> list[dict]:
    """Rows with a call each; tables give each struct the keys of all rows."""
    rows = []
    for number, arguments in enumerate(ARGUMENTS):
        name = "add" if "a" in arguments else "weather"
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
        result = {"functionResponse": {"name": name, "response": {f"r{number}": number}}}
        turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "tool_calls": [call]}]
        turns.append({"role": "tool", "content": f"r{number}", "tool_call_id": "c"})
        if style == "gemini":
            part = {"functionCall": {"name": name, "args": arguments}}
            turns[1:] = [{"role": "model", "parts": [part]}, {"role": "user", "parts": [result]}]
            turns[0] = {"role": "user", "parts": [{"text": f"q{number}"}]}
        row = {"messages": [*turns, {"role": "assistant", "content": "a"}], "tools": DECLARED}
        if style == "gemini":
            row["messages"][-1] = {"role": "model", "parts": [{"text": "a"}]}
        if style == "xlam":
            row = {"query": f"q{number}", "answers": [{"name": name, "arguments": arguments}], "tools": DECLARED}
        rows.append(row)
    return rows


@pytest.mark.parametrize("style", ["openai", "gemini", "xlam"])
def test_null_keys_that_a_table_adds_to_arguments_results_and_declarations_are_left_out(tmp_path, style):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(calls_of(style)), tmp_path / "a.parquet")
    reader = ConversationReader(find_sources([str(tmp_path / "a.parquet")]))
    found = list(reader)

    expected = list(read(written(tmp_path / "a.json", calls_of(style))))
    assert [one.turns for one in found] == [one.turns for one in expected]
    assert [one.tools for one in found] == [one.tools for one in expected]
    assert [dict(one.turns[1].tool_calls[0].arguments) for one in found] == ARGUMENTS
    (note,) = [note for note in reader.counts.notes() if "keys not read" in note]
    assert note.endswith("keys not read: null arguments (1 row)")


def test_null_arguments_that_a_table_holds_as_json_stay(tmp_path):
    rows = calls_of("openai")
    for row in rows:
        function = row["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(
            function["arguments"] | ({"unit": None} if "a" not in function["arguments"] else {})
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    assert [one.turns[1].tool_calls[0].arguments.get("unit", "-") for one in read(tmp_path / "a.parquet")] == [
        None,
        "-",
        None,
    ]


def test_items_of_responses_are_read_from_tables(tmp_path):
    call = {"type": "function_call", "name": "add", "arguments": '{"a": 1}', "call_id": "c"}
    items = [
        {"role": "user", "content": "q"}, call, {"type": "function_call_output", "call_id": "c", "output": "r"},
        {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    table = {"messages": [[{key: item.get(key) for key in {**call, **items[0], **items[2]}} for item in items]]}
    pyarrow.parquet.write_table(pyarrow.table(table | {"tools": [json.dumps(DECLARED)]}), tmp_path / "a.parquet")

    (found,) = read(tmp_path / "a.parquet")
    assert [turn.role for turn in found.turns] == ["human", "model", "tool", "model"]
