"""Rows as published data sets and logs of APIs have them: what decides something is read, or refused."""

import json
import time
from typing import Any

import pytest

from finetune.conversation import BadRow
from finetune.dataset.call_elements import element_calls
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import find_sources
from tests.helpers.chat_rows import faults, read, spoken, written

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = [ASKED, ANSWERED]
PAIR = [("human", "q"), ("model", "a")]
NAME = {"type": "string"}
DECLARED = [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": NAME}}}]
CALLED, RESULT = {"name": "f", "arguments": {"x": "1"}}, {"role": "tool", "content": "r"}


def only(row: dict[str, Any], tmp_path) -> Any:
    (one,) = read(written(tmp_path / "a.json", [row]))
    assert not isinstance(one, BadRow), one.faults
    return one


@pytest.mark.parametrize(
    "row",
    [
        {"input": [ASKED], "output": "a", "reasoning": "off", "version": "1"},
        {"prompt": "q", "completion": [ANSWERED], "thinking": {"type": "enabled", "budget_tokens": 9}},
        {"prompt": ASKED, "response": ANSWERED},
        {"messages": CHAT, "reasoning": "on"},
        {"trajectory": CHAT, "tools": [], "resolved": 1},
        {"messages": [ASKED, ANSWERED | {"thought": "a", "action": "a"}]},
        {"conversation": [{"human": "q", "assistant": "a", "reasoning": ""}]},
    ],
)
def test_turns_may_stand_on_either_side_of_a_pair_and_a_mode_is_no_reasoning(row, tmp_path):
    one = only(row, tmp_path)
    assert spoken(one) == PAIR and not one.turns[1].reasoning and one.turns[1].is_supervised


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED], "reasoning": "r", "answer": "a"},
        {"query": "q", "response": "a", "thought": "r"},
        {"prompt": [ASKED], "completion": "a", "reasoning_content": "r"},
        {"turns": [{"question": "q", "answer": "a", "thinking": "r"}]},
    ],
)
def test_reasoning_beside_an_answer_is_that_of_the_answer(row, tmp_path):
    one = only(row, tmp_path)
    assert spoken(one) == PAIR and one.turns[1].reasoning == "r"


def test_reasoning_with_which_an_answer_begins_is_reasoning(tmp_path):
    assert only({"messages": [ASKED, ANSWERED | {"reasoning_content": "a"}]}, tmp_path).turns[1].reasoning == "a"


def test_flags_of_an_exchange_and_of_a_history_decide_what_is_supervised(tmp_path):
    exchanges = [{"human": f"q{flag}", "assistant": "a"} | flag for flag in ({"train": False}, {"weight": 0}, {})]
    assert [turn.train for turn in only({"conversation": exchanges}, tmp_path).turns[1::2]] == [False, False, True]
    row = {"prompt": [ASKED, ANSWERED, ASKED], "completion": "b", "history": [["h", "i"]]}
    assert [turn.train for turn in only(row, tmp_path).turns[1::2]] == [True, False, True]
    row = {"prompt": "q", "response": "a", "history": [{"role": "user", "content": "h"}, ANSWERED | {"train": False}]}
    assert [turn.train for turn in only(row, tmp_path).turns[1::2]] == [False, True]


@pytest.mark.parametrize("key", ["system", "instructions", "preamble"])
def test_a_system_prompt_may_be_parts_with_more_keys(key, tmp_path):
    parts = [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]
    assert spoken(only({"input": "q", "output": "a", key: parts}, tmp_path)) == [("system", "s"), *PAIR]


@pytest.mark.parametrize(
    "call",
    [
        f"<TOOLCALL>[{json.dumps(CALLED)}]</TOOLCALL>",
        '<functioncall> {"name": "f", "arguments": \'{"x": "1"}\'} <|endoftext|>',
        f"[TOOL_CALLS] [{json.dumps(CALLED)}]</s>",
        f"<|python_tag|>{json.dumps(CALLED)}<|eom_id|>",
        f"functools[{json.dumps(CALLED)}]",
        '<|tool_call_start|>[f(x="1")]<|tool_call_end|>',
        f"<tool_calls>[{json.dumps(CALLED)}]</tool_calls>",
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
        '<function_calls>\n<invoke name="f">\n<parameter name="x">1</parameter>\n</invoke>\n</function_calls>',
        '<function=f>{"x": "1"}</function>',
    ],
)
def test_calls_behind_the_marker_of_a_model_are_calls(call, tmp_path):
    turns = [ASKED, {"role": "assistant", "content": f"Let me see. {call}"}, RESULT, ANSWERED]
    one = only({"messages": turns, "tools": DECLARED}, tmp_path)
    assert one.turns[1].text == "Let me see."
    assert [(found.name, found.arguments) for found in one.turns[1].tool_calls] == [("f", {"x": "1"})]


@pytest.mark.parametrize(
    "said",
    [
        "<|tool_call>call:f{x:1}<tool_call|>",
        "<function=f><parameter=x>1</parameter> x </function>",
        "<function=f><parameter=x>1</parameter></function> Done.",
        f"{json.dumps(CALLED)}</tool_call>",
        '<|START_ACTION|>[{"tool_name": "f", "parameters": {}}]<|END_ACTION|>',
        '<|channel|>commentary to=functions.f<|message|>{"x": "1"}<|call|>',
    ],
)
def test_a_call_in_a_syntax_that_is_not_read_is_never_text(said, tmp_path):
    row = {"messages": [ASKED, {"role": "assistant", "content": said}], "tools": DECLARED}
    assert "turn 1" in faults(written(tmp_path / "a.json", [row]))[0]


def test_arguments_of_elements_have_the_types_that_are_declared(tmp_path):
    said = {
        "name": "07",
        "note": " a\n b",
        "days": "3",
        "open": "True",
        "more": '{"a": [1]}',
        "other": "2",
        "city": "12",
    }
    optional = {"anyOf": [NAME, {"type": "null"}]}
    types = {"name": NAME, "note": NAME, "days": {"type": "integer"}, "open": {"type": "bool"}, "city": optional}
    elements = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in said.items())
    call = f"<think>As <tool_call>.</think><tool_call>\n<function=f>\n{elements}</function>\n</tool_call>"
    tool = {"name": "f", "parameters": {"type": "object", "properties": types}}
    turn = only({"messages": [ASKED, {"role": "assistant", "content": call}], "tools": [tool]}, tmp_path).turns[1]
    assert turn.text == "<think>As <tool_call>.</think>"
    assert turn.tool_calls[0].arguments == said | {"days": 3, "open": True, "more": {"a": [1]}, "other": 2}
    many, began = "<function=f><parameter=x>" * 3000, time.monotonic()
    assert element_calls(many, []) == ([], many) and time.monotonic() - began < 5


def test_calls_beside_a_text_that_repeats_them_are_called_once(tmp_path):
    said = f"<tool_call>{json.dumps(CALLED)}</tool_call>"
    turn = {"role": "assistant", "content": said, "tool_calls": [CALLED | {"id": "c"}]}
    (call,) = only({"messages": [ASKED, turn], "tools": DECLARED}, tmp_path).turns[1].tool_calls
    assert call.id == "c"


@pytest.mark.parametrize("names", [("function-call", "function-response"), ("Tool Call", "tool result")])
def test_names_of_roles_may_be_written_with_other_separators(names, tmp_path):
    turns = [ASKED, {"role": names[0], "content": CALLED}, {"role": names[1], "content": {"y": 1}}, ANSWERED]
    one = only({"messages": turns, "tools": DECLARED}, tmp_path)
    assert [turn.role for turn in one.turns] == ["human", "model", "tool", "model"] and one.turns[1].tool_calls


def test_items_of_the_responses_api_are_calls_and_results(tmp_path):
    items = [
        ASKED, {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x": "1"}'},
        {"type": "function_call_output", "call_id": "c", "output": "r"},
    ]  # fmt: skip
    output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]
    one = only({"input": items, "output": output, "tools": [{"type": "function", **DECLARED[0]}]}, tmp_path)
    assert [(turn.role, turn.is_supervised) for turn in one.turns] == [
        ("human", False), ("model", False), ("tool", False), ("model", True),
    ]  # fmt: skip
    assert one.turns[1].tool_calls[0].id == one.turns[2].tool_call_id == "c"


@pytest.mark.parametrize("key", ["parametersJsonSchema", "arguments"])
def test_schemas_have_other_keys_and_nulls_of_tables_are_none(key, tmp_path):
    schema = {"type": "object", "properties": {"x": {"type": "string", "enum": None, "examples": None}, "y": None}}
    row = {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALLED]}], "tools": [{"name": "f", key: schema}]}
    assert only(row, tmp_path).tools[0]["function"]["parameters"] == {"type": "object", "properties": {"x": NAME}}


def test_keys_beside_a_tree_of_messages_decide_as_elsewhere(tmp_path):
    tree = {"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a", "replies": []}]}}
    assert spoken(only(tree | {"system": "s"}, tmp_path)) == [("system", "s"), *PAIR]
    assert "not to be imitated" in faults(written(tmp_path / "b.json", [tree | {"label": False}]))[0]


@pytest.mark.parametrize("key", ["tool_call", "function_calls"])
def test_calls_may_stand_under_other_keys(key, tmp_path):
    turns = [ASKED, {"role": "assistant", "content": "a", key: CALLED}, RESULT, ANSWERED]
    one = only({"messages": turns, "tools": DECLARED}, tmp_path)
    assert one.turns[1].text == "a" and [call.name for call in one.turns[1].tool_calls] == ["f"]


def test_a_plan_beside_a_call_is_reasoning(tmp_path):
    turns = [ASKED, {"role": "assistant", "tool_plan": "Ask f.", "tool_calls": [CALLED]}, RESULT, ANSWERED]
    assert only({"messages": turns, "tools": DECLARED}, tmp_path).turns[1].reasoning == "Ask f."


@pytest.mark.parametrize(
    "row", [{"inputs": "q", "targets": "a"}, {"question": "q", "context": "", "answer": "a"}, {"text": "t", "score": 0}]
)
def test_rows_of_other_well_known_keys_are_read(row, tmp_path):
    said = spoken(only(row, tmp_path))
    assert said == ([("text", "t")] if "text" in row else PAIR)


@pytest.mark.parametrize(
    "text", ["### Human: q### Assistant: a", "<s>[INST] q [/INST] a </s>", "USER: q\nASSISTANT: a"]
)
def test_chats_that_are_written_as_text_are_said_to_be_supervised_whole(text, tmp_path):
    reader = ConversationReader(find_sources(str(written(tmp_path / "a.json", [{"text": text}, {"text": "A page."}]))))
    assert len([*reader]) == 2
    assert [("1 row read as text" in note, "human turns" in note) for note in reader.counts.notes()] == [
        (True, True), (True, False),
    ]  # fmt: skip


def test_a_context_stands_behind_its_question(tmp_path):
    row = {"context": "c", "question": "q", "answer": "a"}
    assert spoken(only(row, tmp_path)) == [("human", "q\nc"), PAIR[1]]


@pytest.mark.parametrize("value", [False, "false", " False"])
def test_context_of_tables_of_texts_is_not_supervised(value, tmp_path):
    row = {"messages": [ASKED, ANSWERED | {"train": value}, ASKED, ANSWERED]}
    assert [turn.train for turn in only(row, tmp_path).turns[1::2]] == [False, True]


def test_a_system_turn_may_have_its_text_under_system_prompt(tmp_path):
    system = {"role": "system", "system_prompt": "s", "text": None}
    turns = [system, {"role": "user", "system_prompt": None, "text": "q"}, {"role": "ai", "mask": False, "text": "a"}]
    assert spoken(only({"trajectory": turns}, tmp_path)) == [("system", "s"), *PAIR]


def test_a_row_may_say_that_its_last_answer_alone_is_supervised(tmp_path):
    for flag in (True, False):
        row = {"messages": [ASKED, ANSWERED, ASKED, ANSWERED], "mask_history": flag}
        assert [turn.train for turn in only(row, tmp_path).turns[1::2]] == [not flag, True]


REFUSED = [
    ({"steps": CHAT}, "--columns messages=steps"),
    ({"messages": CHAT, "mask_history": "some"}, 'expected "mask_history" to be true or false'),
    ({"messages": CHAT, "loss_mask": [0, 0]}, 'write "train" or "weight" into the turns'),
    ({"messages": CHAT, "sample_weight": 0.0}, "not to be imitated"),
    ({"messages": CHAT, "loss_scale": 0}, "not to be imitated"),
    ({"messages": [ASKED, ANSWERED | {"is_trainable": False}]}, "not to be imitated"),
    ({"context": [ASKED], "response1": "a", "response2": "b", "overall_preference": -1}, "preferences are not"),
    ({"conversation_a": CHAT, "conversation_b": CHAT, "winner": "model_a"}, "preferences are not"),
    ({"messages": [ASKED, ANSWERED | {"reasoning": "off"}]}, 'has "reasoning": "off", which is no reasoning'),
    ({"prompt": "q", "response": "<think>r</think>a", "reasoning": "r"}, "reasoning beside the text and in it"),
    ({"messages": [ASKED, {"role": "assistant", "content": "\n<think>r"}]}, "has no </think>: was it cut off?"),
    ({"text": "t", "reasoning": "r"}, 'beside "text", all of which is supervised'),
    ({"conversation": [{"instruction": "i", "input": "q", "output": "a"}]}, "more texts, which would be lost: instruc"),
    ({"turns": [{"question": "q", "context": "c", "answer": "a"}]}, "more texts, which would be lost: context"),
    ({"segments": [{"label": False, "text": "q"}, {"label": True, "text": "a"}]}, "found the keys segments"),
    ({"prompt": "q", "response": "a", "helpfulness": 0}, '"helpfulness" grades the answer'),
    ({"prompt": "q", "response": "a", "category": {"x": True}, "is_safe": False}, "not to be imitated"),
    ({"conversation": [ASKED, ANSWERED | {"toxic": True}]}, "not to be imitated"),
    ({"messages": [ASKED, ANSWERED | {"train_on_turn": False}]}, "not to be imitated"),
    ({"messages": CHAT, "chat_template_kwargs": {"tools": DECLARED}}, "has tools, no variable of chat templates"),
    ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "no variable of chat templates"),
    ({"messages": [ASKED, {"role": "tool_call", "content": "[]"}]}, "holds no call"),
    ({"messages": [ASKED, {"role": "tool_call"}]}, 'expected "content" to be a string, found null'),
    (
        {"messages": [ASKED, {"role": "assistant", "content": [{"reasoningContent": {"reasoningText": "r"}}]}]},
        "only text",
    ),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": "[ ]"}]}, '"content" is empty'),
    (
        {"messages": [ASKED, {"role": "assistant", "content": "<tool_call>[]</tool_call>"}], "tools": DECLARED},
        "no call",
    ),
    (
        {"messages": [ASKED, {"role": "assistant", "content": "<function=f>1"}], "tools": DECLARED},
        "write calls as JSON",
    ),
    ({"messages": [ASKED, {"type": "reasoning", "summary": ["r"]}, ANSWERED]}, "an item with reasoning"),
    (
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "tool_use", **CALLED}, {"text": "behind"}]}]},
        "text behind a call",
    ),
    (
        {"messages": [ASKED, {"role": "assistant", "content": [{"text": "a"}, {"type": "thinking", "thinking": "r"}]}]},
        "reasoning behind text",
    ),
]


@pytest.mark.parametrize(("row", "said"), REFUSED)
def test_what_cannot_be_read_is_refused_with_its_reason(row, said, tmp_path):
    assert said in faults(written(tmp_path / "a.json", [row]))[0]


def test_a_key_of_a_list_of_turns_with_another_value_is_named(tmp_path):
    from finetune.dataset.row_reading import RowReading

    assert RowReading({"prompt": "q", "response": "a", "turns": 3, "data": ""}, "row 0").unread == ["turns"]
