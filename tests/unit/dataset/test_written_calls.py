"""Calls and declarations that stand in the texts of turns: ToolACE, Hermes, JSON."""

import json
import time

import pytest

from finetune.conversation import ToolCall, to_row
from finetune.dataset.written_calls import bracketed_calls, json_calls, python_calls, tools_in_prose, tools_in_text
from tests.helpers.chat_rows import faults, read, written

PROSE = "Call functions.\nHere they are as JSON:\n{}\nWrite calls as [func1(params_name=params_value), func2(params)]"


FUNCTION = {
    "name": "Find Book", "description": "d", "required": None,
    "parameters": {"type": "dict", "required": ["title"], "properties": {
        "title": {"type": "string"}, "from": {"type": "int"}, "max-n": {"type": "int"}, "open": {"type": "bool"}}},
}  # fmt: skip


def toolace(said: str, *functions: dict, system: str = PROSE) -> dict:
    told = ("user", "q"), ("assistant", said), ("tool", '[{"name": "Find Book", "results": {"shelf": 4}}]')
    turns = [{"from": role, "value": text} for role, text in (*told, ("assistant", "a"))]
    return {"system": system.replace("{}", json.dumps(functions)), "conversations": turns}


def test_rows_of_toolace_are_read_as_published(tmp_path):
    said = (
        """[Find Book(title="a), Find Book(x='", from=1, max-n=-2, open=True), Find Book(title='null', open=false) ]"""
    )
    (one,) = read(written(tmp_path / "a.json", [toolace(said, FUNCTION)]))

    arguments = {"title": "a), Find Book(x='", "from": 1, "max-n": -2, "open": True}, {"title": "null", "open": False}
    assert one.turns[2].tool_calls == tuple(ToolCall("Find Book", given) for given in arguments)
    assert one.turns[2].text == "" and [turn.role for turn in one.turns] == "system human model tool model".split()
    row = to_row(one.turns, one.id, one.tools)
    assert read(written(tmp_path / "again.json", [row]))[0].turns == one.turns  # the declarations stay in the text
    for index, before in enumerate(("<think>Hm.</think>", "I look it up.\n")):
        (one,) = read(written(tmp_path / f"{index}.json", [toolace(f"{before}{said}", FUNCTION)]))
        assert one.turns[2].text == before.strip() and len(one.turns[2].tool_calls) == 2
    (fault,) = faults(written(tmp_path / "b.json", [toolace(f"{said} Done.", FUNCTION)]))[:1]
    assert 'turn 1: text behind a call, where no template writes it: "Done."' in fault
    row = toolace("Write [Find Book(title=x)] or [Lose Book(title='x')].", FUNCTION)
    row["tools"], row["conversations"] = [FUNCTION], row["conversations"][:2]
    assert read(written(tmp_path / "text.json", [row]))[0].turns[2].tool_calls == ()


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ('[Find Book(title="a", from="b")]', "from: 'b' is not of type 'integer'"),
        ('[Lose Book(title="a")]', 'calls "Lose Book", which is not declared (Find Book)'),
        ('[Find Book("a")]', "turn 1: a call that cannot be read as [name(key=value)]"),
        ('[Find Book(title=open("x"))]', "a call that cannot be read"),
        ('[Find Book(title="a", title="b")]', "a call that cannot be read"),
        ('<think>Hm.</think>[Find Book(title="a")]\n[Find Book(title="b")]', "text behind a call"),
    ],
)  # fmt: skip
def test_calls_of_toolace_are_checked(said, fault, tmp_path):
    assert fault in faults(written(tmp_path / "a.json", [toolace(said, FUNCTION)]))[0]
    system = "You may call functions: Find Book(title)."
    assert "no declarations are found" in faults(written(tmp_path / "b.json", [toolace(said, system=system)]))[0]


@pytest.mark.parametrize("repeated", ["[f(", "[f(x=1)] and "])
def test_a_text_that_repeats_itself_is_read_in_a_moment(repeated):
    text, began = f"Say {repeated * 3000}", time.monotonic()
    assert bracketed_calls(text, {"f"}) == (text, [], [])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["no list", "[1]", '[{"parameters": 1}]', '[{"function": {"name": ""}}]'])
def test_what_is_no_list_of_declarations_declares_nothing(text):
    assert tools_in_prose(text) == () and tools_in_text(f"<tools>{text}</tools>") == ()


@pytest.mark.parametrize("text", ["[f(]", "[f(x=)]", "[f(x=1) g()]", "[f(x=1)", "[]"])
def test_what_is_no_list_of_calls_is_text(text):
    assert python_calls(text) == ([], 0)


@pytest.mark.parametrize("text", ['{"name": "f"}', '{"name": "g", "arguments": {}}', "[1]", "[", "[1}"])
def test_json_that_calls_no_declared_function_is_text(text):
    assert json_calls(text, {"f"}, []) == []
