"""Rows with tool calls in the forms of published data, and each fault of calls, results and declarations."""

import copy
import json
from typing import Any

import pytest

from finetune.conversation import BadRow, Conversation, ToolCall, Turn
from finetune.dataset.tool_checks import check_tools
from tests.helpers.chat_rows import faults, read, written

SCHEMA = {"type": "object", "properties": {"title": {"type": "string"}, "year": {"type": "integer"}},
          "required": ["title"]}  # fmt: skip
BARE = {"name": "find_book", "description": "Find a book", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": BARE}]
CALL = {"title": "The Sea", "year": 2005}
ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def openai_call(own_id: str | None = "a", arguments: Any = CALL, name: str = "find_book") -> dict:
    given = {} if own_id is None else {"id": own_id}
    return {**given, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict, content: Any = None) -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(own_id: str | None = "a", text: str = "shelf 4", **others: Any) -> dict:
    return {"role": "tool", "content": text} | ({} if own_id is None else {"tool_call_id": own_id}) | others


def rows_of(*turns: dict, tools: Any = TOOLS) -> dict:
    return {"messages": [ASK, *turns], "tools": tools}


def turns_of(own_id: str | None = None, name: str | None = None, said: str = "", arguments: Any = CALL) -> list[Turn]:
    return [
        Turn("human", "q"), Turn("model", said, tool_calls=(ToolCall("find_book", arguments, own_id),)),
        Turn("tool", "shelf 4", tool_call_id=own_id, tool_name=name), Turn("model", "a"),
    ]  # fmt: skip


TEXT_CALL = json.dumps({"name": "find_book", "arguments": CALL})
HERMES = f"<tool_call>\n{TEXT_CALL}\n</tool_call>"
PYTHON_CALL = "[find_book(title='The Sea', year=2005)]"
FORMATS = {
    "openai": (rows_of(calling(openai_call()), result(), ANSWER), turns_of("a")),
    "arguments as text": (rows_of(calling(openai_call("a", json.dumps(CALL))), result(), ANSWER), turns_of("a")),
    "openai, bare tools": (rows_of(calling(openai_call()), result(), ANSWER, tools=[BARE]), turns_of("a")),
    "tools as text": (rows_of(calling(openai_call()), result(), ANSWER, tools=json.dumps([BARE])), turns_of("a")),
    "said before the call": (
        rows_of(calling(openai_call(), content="I look."), result(), ANSWER), turns_of("a", said="I look."),
    ),
    "own": (
        {"tools": TOOLS, "conversations": [
            {"from": "human", "value": "q"},
            {"from": "model", "value": "", "tool_calls": [{"name": "find_book", "arguments": CALL, "id": "a"}]},
            {"from": "tool", "value": "shelf 4", "tool_call_id": "a"}, {"from": "model", "value": "a"}]},
        turns_of("a"),
    ),
    "functions": (
        {"functions": [BARE], "messages": [
            ASK, {"role": "assistant", "content": None, "function_call": {"name": "find_book", "arguments": CALL}},
            {"role": "function", "name": "find_book", "content": "shelf 4"}, ANSWER]},
        turns_of(None, "find_book"),
    ),
    "sharegpt": (
        {"tools": json.dumps([BARE]), "conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": TEXT_CALL},
            {"from": "observation", "value": "shelf 4"}, {"from": "gpt", "value": "a"}]},
        turns_of(),
    ),
    "ms-swift": (
        rows_of({"role": "tool_call", "content": TEXT_CALL}, {"role": "tool_response", "content": "shelf 4"}, ANSWER),
        turns_of(),
    ),
    "ms-swift, said before the call": (
        rows_of({"role": "assistant", "content": "I look."}, {"role": "tool_call", "content": TEXT_CALL},
                {"role": "tool_response", "content": "shelf 4"}, ANSWER),
        turns_of(said="I look."),
    ),
    "hermes": (
        rows_of({"role": "assistant", "content": f"I look.\n{HERMES}"},
                {"role": "tool", "content": "<tool_response>\nshelf 4\n</tool_response>"}, ANSWER),
        turns_of(said="I look."),
    ),
    "hermes, a Python literal and a human turn": (
        rows_of({"role": "assistant", "content": f"<tool_call>{json.loads(TEXT_CALL)!r}</tool_call>"},
                {"role": "user", "content": "<tool_response>shelf 4</tool_response>"}, ANSWER),
        turns_of(),
    ),
    "python calls": (
        rows_of({"role": "assistant", "content": PYTHON_CALL}, {"role": "tool", "content": "shelf 4"}, ANSWER),
        turns_of(),
    ),
    "bedrock and anthropic parts": (
        rows_of({"role": "assistant", "content": [
            {"text": "I look."}, {"toolUse": {"toolUseId": "a", "name": "find_book", "input": CALL}},
        ]}, result(), ANSWER),
        turns_of("a", said="I look."),
    ),
    "anthropic": (
        rows_of({"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "find_book", "input": CALL}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [
                    {"type": "text", "text": "shelf "}, {"type": "text", "text": "4"}]}]}, ANSWER,
                tools=[{"input_schema" if key == "parameters" else key: value for key, value in BARE.items()}]),
        turns_of("a"),
    ),
    "bedrock": (
        {"toolConfig": {"tools": [{"toolSpec": {"name": "find_book", "description": "Find a book",
                                                "inputSchema": {"json": SCHEMA}}}]},
         "messages": [
            {"role": "user", "content": [{"text": "q"}]},
            {"role": "assistant", "content": [{"toolUse": {"toolUseId": "a", "name": "find_book", "input": CALL}}]},
            {"role": "user", "content": [{"toolResult": {"toolUseId": "a", "content": [{"text": "shelf 4"}]}}]},
            {"role": "assistant", "content": [{"text": "a"}]}]},
        turns_of("a"),
    ),
    "gemini": (
        {"tools": [{"functionDeclarations": [BARE]}], "contents": [
            {"role": "user", "parts": [{"text": "q"}]},
            {"role": "model", "parts": [{"functionCall": {"name": "find_book", "args": CALL}}]},
            {"role": "user", "parts": [{"functionResponse": {"name": "find_book", "response": {"shelf": "四"}}}]},
            {"role": "model", "parts": [{"text": "a"}]}]},
        [*turns_of()[:2], Turn("tool", '{"shelf": "四"}', tool_name="find_book"), Turn("model", "a")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=FORMATS)
def test_calls_results_and_declarations_are_read_in_each_form(row, expected, tmp_path):
    (one,) = read(written(tmp_path / "a.json", [row]))

    assert isinstance(one, Conversation), one
    assert [*one.turns] == expected
    assert one.tools == tuple(TOOLS)


def test_parallel_calls_are_one_turn_and_keep_their_order(tmp_path):
    calls = [openai_call("a"), openai_call("b", {"year": 1, "title": "x"})]
    (one,) = read(written(tmp_path / "a.json", [rows_of(calling(*calls), result("b"), result("a"), ANSWER)]))

    assert [call.id for call in one.turns[1].tool_calls] == ["a", "b"]
    assert [*one.turns[1].tool_calls[1].arguments] == ["year", "title"]
    two = [{"role": "tool_call", "content": TEXT_CALL}] * 2
    (one,) = read(written(tmp_path / "b.json", [rows_of(*two, result(None), result(None), ANSWER)]))
    assert len(one.turns[1].tool_calls) == 2 and len(one.turns) == 5
    listed = {"from": "function_call", "value": json.dumps([json.loads(TEXT_CALL)] * 2)}
    row = {"tools": TOOLS, "conversations": [
        {"from": "human", "value": "q"}, listed, {"from": "observation", "value": "both"}, {"from": "gpt", "value": "a"}
    ]}  # fmt: skip
    (one,) = read(written(tmp_path / "c.json", [row]))
    assert len(one.turns[1].tool_calls) == 2, "one result may hold those of two calls without ids"


def test_xlam_rows_are_a_question_and_its_calls(tmp_path):
    tools = [{"name": "f", "description": "d", "parameters": {"x": {"type": "int, optional", "default": 1}}}]
    answers = [{"name": "f", "arguments": {"x": 5}}]
    row = {"id": 0, "query": "q", "tools": json.dumps(tools), "answers": json.dumps(answers)}
    (one,) = read(written(tmp_path / "a.json", [row]))

    assert [*one.turns] == [Turn("human", "q"), Turn("model", "", tool_calls=(ToolCall("f", {"x": 5}),))]
    assert one.tools[0]["function"]["parameters"] == {"type": "object", "properties": tools[0]["parameters"]}
    answers[0]["arguments"]["x"] = "five"
    (fault,) = faults(written(tmp_path / "b.json", [{**row, "answers": answers}]))
    assert "x: 'five' is not of type 'integer'" in fault


def test_calls_and_results_may_be_json_values_in_place_of_their_text(tmp_path):
    row = {"tools": TOOLS, "conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": json.loads(TEXT_CALL)},
        {"from": "observation", "value": {"shelf": "四"}}, {"from": "gpt", "value": "a"},
        {"from": "function_call", "value": [json.loads(TEXT_CALL)]}, {"from": "observation", "value": [{"shelf": 4}]},
        {"from": "function_call", "value": TEXT_CALL}, {"from": "observation", "value": ""},
        {"from": "gpt", "value": f"[{TEXT_CALL}]"}, {"from": "ipython", "value": "4"}, {"from": "gpt", "value": "b"},
    ]}  # fmt: skip
    (one,) = read(written(tmp_path / "a.json", [row]))

    assert [turn.text for turn in one.turns if turn.role == "tool"] == ['{"shelf": "四"}', '[{"shelf": 4}]', "", "4"]
    first, *others = [turn.tool_calls for turn in one.turns if turn.tool_calls]
    assert len(first) == 1 and others == [first] * 3


def test_declarations_in_a_hermes_system_turn_are_checked_and_stay_text(tmp_path):
    system = {"role": "system", "content": f"Call.\n<tools>\n{json.dumps(BARE)}\n</tools>"}
    turns = [system, ASK, {"role": "assistant", "content": HERMES}, result(None), ANSWER]
    (one,) = read(written(tmp_path / "a.json", [{"messages": turns, "tools": [BARE]}]))

    assert one.tools == () and one.turns[2].tool_calls == (ToolCall("find_book", CALL),)
    turns[2] = {"role": "assistant", "content": HERMES.replace("find_book", "lose_book")}
    assert 'calls "lose_book", which is not declared (find_book)' in faults(
        written(tmp_path / "b.json", [{"messages": turns}])
    )[0]  # fmt: skip


def test_null_keys_of_tables_are_left_out_and_null_arguments_that_are_allowed_stay(tmp_path):
    schema = copy.deepcopy(SCHEMA)
    schema["properties"] |= {"note": {"type": ["string", "null"], "default": None}, "other": None}
    tools = [{"type": "function", "function": {**BARE, "parameters": schema, "strict": None}}]
    row = rows_of(calling(openai_call("a", {"title": "x", "year": None, "note": None, "city": None})), tools=tools)
    (one,) = read(written(tmp_path / "a.json", [row]))

    assert one.turns[1].tool_calls[0].arguments == {"title": "x", "note": None}
    function = one.tools[0]["function"]
    assert [*function] == ["name", "description", "parameters"]
    assert [*function["parameters"]["properties"]] == ["title", "year", "note"]


BAD = {
    "undeclared": (rows_of(calling(openai_call(name="g")), result(), ANSWER), 'turn 1: calls "g", which is not'),
    "no tools": (rows_of(calling(openai_call()), result(), ANSWER, tools=[]), "the row declares no tools"),
    "wrong type": (
        rows_of(calling(openai_call("a", {"year": "soon"})), result(), ANSWER),
        "year: 'soon' is not of type 'integer'; 'title' is a required property",
    ),
    "no JSON": (rows_of(calling(openai_call("a", '{"title": ')), result(), ANSWER), "cannot be read as JSON"),
    "no object": (rows_of(calling(openai_call("a", [1])), result(), ANSWER), "to be a JSON object, found [1]"),
    "repeated key": (rows_of(calling(openai_call("a", '{"a": 1, "a": 2}')), result(), ANSWER), '"a" twice'),
    "same id": (
        rows_of(calling(openai_call(), openai_call()), result(), result(), ANSWER), 'has 2 calls with the id "a"',
    ),
    "no result": (rows_of(calling(openai_call()), ANSWER), 'turn 1: calls "find_book (a)" without a result'),
    "one result of two": (
        rows_of(calling(openai_call("a"), openai_call("b")), result("a"), ANSWER), '"find_book (b)" without a result',
    ),
    "unknown id": (rows_of(calling(openai_call()), result("z"), ANSWER), 'turn 2: the result of the call "z", and no'),
    "second result": (rows_of(calling(openai_call()), result(), result(), ANSWER), "a second result of the call"),
    "no call": (rows_of(result(), ANSWER), "turn 1: a tool result without a call right before it"),
    "other name": (rows_of(calling(openai_call()), result(name="g"), ANSWER), 'the result of "g", and the call before'),
    "last": (rows_of(calling(openai_call()), result()), "turn 2: the last turn is tool, nobody answers it"),
    "declared twice": (rows_of(ANSWER, tools=[BARE, BARE]), 'declares "find_book" twice'),
    "bad schema": (
        rows_of(ANSWER, tools=[{"name": "f", "parameters": {"type": "objekt", "properties": {}}}]),
        'the declaration of "f" is no valid JSON Schema: type: ',
    ),
    "no name": (rows_of(ANSWER, tools=[{"parameters": SCHEMA}]), '"tools": expected declared functions with a "name"'),
    "not JSON tools": (rows_of(ANSWER, tools="[{"), '"tools": the declarations cannot be read as JSON'),
    "text before a result": (
        rows_of(calling(openai_call()), {"role": "user", "content": [
            {"type": "text", "text": "So:"}, {"type": "tool_result", "tool_use_id": "a", "content": "4"}]}, ANSWER),
        "part 1: a tool result behind a text",
    ),
    "result of the model": (
        rows_of(calling(openai_call()), {"role": "assistant", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": "shelf 4"}]}),
        "has tool results in a model turn",
    ),
    "image in a result": (
        rows_of(calling(openai_call()), {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}]}, ANSWER),
        "a tool result: only text is read",
    ),
    "human calls": (
        {"tools": TOOLS, "messages": [{**ASK, "tool_calls": [openai_call()]}, ANSWER]}, "only a model turn calls",
    ),
    "text behind a call": (
        rows_of({"role": "assistant", "content": f"{HERMES} and more"}, result(None), ANSWER), "text behind a call",
    ),
    "a call without an end": (
        rows_of({"role": "assistant", "content": HERMES.partition("</")[0]}, result(None), ANSWER), "close it",
    ),
    "calls in a text without declarations": (
        {"messages": [ASK, {"role": "assistant", "content": HERMES}, result(None), ANSWER]}, "declares no tools",
    ),
    "no answer": ({"query": "q", "tools": TOOLS, "answers": []}, "holds no call"),
    "a call that is no call": (
        rows_of(calling({"type": "custom", "name": "x"}), result(None), ANSWER), 'expected calls with "name"',
    ),
    "null result": (rows_of(calling(openai_call()), result(text=None), ANSWER), "found null: write it as text"),
    "images as a result": (
        rows_of(calling(openai_call()), result(text=[{"image": "x"}]), ANSWER), "only text is read",
    ),
    "image as a result": (
        rows_of(calling(openai_call()), result(text={"type": "image", "image": "x"}), ANSWER), "write it as text",
    ),
    "lone surrogate": (rows_of(calling(openai_call("a", {"title": "\ud83d"})), result(), ANSWER), "half a character"),
    "endless reference": (
        rows_of(calling(openai_call("a", {}, "f")), result(), ANSWER,
                tools=[{"name": "f", "parameters": {"$ref": "#"}}]),
        "refers to itself without end",
    ),
    "reference into the web": (
        rows_of(calling(openai_call("a", {}, "f")), result(), ANSWER,
                tools=[{"name": "f", "parameters": {"$ref": "http://localhost:9/x.json"}}]),
        'the declaration of "f" cannot be applied',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD.values(), ids=BAD)
def test_each_fault_of_calls_and_declarations_has_its_place(row, said, tmp_path):
    path = written(tmp_path / "a.json", [row])
    (bad,) = read(path)

    assert isinstance(bad, BadRow), bad
    assert all(fault.startswith(f"{path}, row 0") for fault in bad.faults)
    assert any(said in fault for fault in bad.faults), bad.faults


@pytest.mark.parametrize("value", [None, "", " ", [], {}, "[]", "null", "{}", False])
def test_an_empty_list_of_tools_is_no_tool(value, tmp_path):
    (one,) = read(written(tmp_path / "a.json", [{"messages": [ASK, ANSWER], "tools": value}]))

    assert one.tools == ()


def test_repairs_know_calls(tmp_path):
    row = rows_of(calling(openai_call()), result(), ANSWER, ASK, tools=None)
    (one,) = read(written(tmp_path / "a.json", [row]), repairs=["undeclared_tools", "drop_last_human"])
    assert [turn.role for turn in one.turns] == ["human", "model", "tool", "model"]

    row = rows_of(calling(openai_call()), result())
    (one,) = read(written(tmp_path / "b.json", [row]), repairs=["drop_last_human", "merge_turns"])
    assert [turn.role for turn in one.turns] == ["human", "model"] and one.turns[1].tool_calls


def test_rows_that_differ_in_a_call_or_in_their_tools_differ(tmp_path):
    rows = [
        rows_of(calling(openai_call("a", {"title": title}))) | {"chat_template_kwargs": {"n": number}}
        for title in ("x", "y") for number in (1, 2)
    ]  # fmt: skip
    assert faults(written(tmp_path / "a.json", rows)) == []
    (fault,) = faults(written(tmp_path / "b.json", [rows[0], rows[0]]))
    assert "says the same as" in fault


@pytest.mark.parametrize(
    ("schema", "value", "fits"),
    [
        ({"type": "list", "items": {"type": "int"}}, [1], True),
        ({"type": "list", "items": {"type": "int"}}, ["1"], False),
        ({"anyOf": [{"type": "str"}, {"type": "float"}]}, 1.5, True),
        ({"anyOf": [{"type": "str"}, {"type": "float"}]}, [], False),
        ({"type": "any", "required": True}, [], True),
    ],
)
def test_types_are_named_as_published_declarations_name_them_at_every_level(schema, value, fits):
    tools = [{"function": {"name": "f", "parameters": {"type": "dict", "properties": {"x": schema}}}}]
    called = Turn("model", "", tool_calls=(ToolCall("f", {"x": value}),))
    (_, faults) = check_tools([(1, called)], tools, "a.json, row 0")
    assert ["do not fit its declaration" in fault for fault in faults] == [True] * (not fits)
