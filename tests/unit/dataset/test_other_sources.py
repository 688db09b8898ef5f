"""CSV and TSV files, trees of messages, columns with other names, remote files, and keys that decide something."""

import json
from datetime import datetime

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from finetune.conversation import BadRow, Conversation, Turn
from finetune.dataset.conversation_reader import ConversationReader, read_conversations
from finetune.dataset.data_sources import find_sources
from finetune.utils.errors import DataError
from tests.helpers.chat_rows import faults, good_row, read, spoken, written
from tests.helpers.rows import CHAT, PAIR

# ---- trees


def message(role: str, text: str, *replies: dict) -> dict:
    return {"role": role, "text": text, "replies": list(replies)}


def test_each_path_of_a_tree_is_a_row_and_each_answer_is_supervised_once(tmp_path):
    unanswered = message("prompter", "q2")
    first = message("assistant", "a1", message("prompter", "q3", message("assistant", "a3")), unanswered)
    tree = message("prompter", "q", first, message("assistant", "a2"))
    rows = [{"message_tree_id": "t", "tree_state": "x", "prompt": tree}, good_row(0)]
    found = read(written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))

    assert spoken(found[0]) == [("human", "q"), ("model", "a1"), ("human", "q3"), ("model", "a3")]
    assert [(one.row, one.id) for one in found] == [(0, "t/0"), (1, "t/1"), (2, 0)]
    assert spoken(found[1]) == [("human", "q"), ("model", "a2")]
    assert all(turn.train for one in found for turn in one.turns)


def test_a_message_by_itself_is_no_text(tmp_path):
    row = {"message_id": "1", "parent_id": None, "role": "assistant", "text": "a"}
    assert "one message of a conversation" in faults(written(tmp_path / "a.json", [row]))[0]


def test_an_answer_that_several_paths_share_is_supervised_in_the_first(tmp_path):
    ends = [message("prompter", text, message("assistant", text)) for text in ("x", "y")]
    tree = message("prompter", "q", message("assistant", "a", *ends))
    one, two = read(written(tmp_path / "a.json", [{"prompt": tree}]))

    assert [turn.train for turn in one.turns] == [True] * 4
    assert [turn.train for turn in two.turns] == [True, False, True, True]


def test_a_bad_path_does_not_take_the_answers_that_others_share(tmp_path):
    ends = [message("prompter", "x", message("assistant", text)) for text in ("", "y", "z")]
    tree = message("prompter", "q", message("assistant", "a", *ends))
    bad, one, two = read(written(tmp_path / "a.json", [{"prompt": tree}]))

    assert isinstance(bad, BadRow)
    assert [[turn.train for turn in row.turns] for row in (one, two)] == [[True] * 4, [True, False, True, True]]


# ---- keys that decide something


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label": False}, "not to be imitated"),
        ({"kto_tag": False}, "not to be imitated"),
        ({"weight": 0}, "not to be imitated"),
        ({"training": False}, "not to be imitated"),
        ({"rejected_response": "b"}, "preferences are not for supervised"),
        ({"documents": [{"title": "x"}]}, "documents beside the turns are not read"),
        ({"available_tools": ["x"]}, '"available_tools": '),
        ({"images": ["x.png"]}, "only text is read"),
        ({"only_last_turn_loss": "yes"}, 'expected "only_last_turn_loss" to be true or false'),
        ({"chat_template_kwargs": 5}, 'expected "chat_template_kwargs" to be an object'),
        ({"weight": "half"}, 'expected "weight" to be a number'),
        ({"solution": "b"}, "or name the one: --columns messages=messages"),
        ({"system_message": "s", "system": "t"}, 'has both "system" and "system_message"'),
    ],
)
def test_a_key_of_a_row_that_cannot_be_honoured_is_a_fault(values, said, tmp_path):
    found = faults(written(tmp_path / "a.json", [{"messages": CHAT, **values}]))

    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prefix": True}, "a turn is supervised as a whole"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "a turn is supervised as a whole"),
        ({"training": False}, "not to be imitated"),
        ({"tools": [{"name": "f"}]}, "tools are declared by the row"),
        ({"reasoning": "x", "thinking": "y"}, "has reasoning under reasoning and thinking, which differ"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, "that is no text"),
    ],
)
def test_a_key_of_a_turn_that_cannot_be_honoured_is_a_fault(values, said, tmp_path):
    (fault,) = faults(written(tmp_path / "a.json", [{"messages": [CHAT[0], {**CHAT[1], **values}]}]))

    assert "turn 1: " in fault and said in fault


def test_keys_that_can_be_honoured_are(tmp_path):
    two = [*CHAT, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": CHAT, "meta_instruction": "s"},
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": two, "only_last_turn_loss": True},
        {"messages": two, "weight": 0.5},
        {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "r", "thinking": "r"}]},
        {"messages": [{"role": "system", "content": "s"}, *two], "system": "s"},
        {"messages": [{"role": name, "content": name} for name in ("System", "USER", "ChatGPT")]},
        {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "u"},
        {"text": "Plain text.", "weight": 2},
        {"messages": [CHAT[0], {**CHAT[1], "thought": "s", "reasoning_details": [{"data": "x"}, {"text": "s"}]}]},
        {"messages": [CHAT[0], {**CHAT[1], "thinking_blocks": [{"thinking": "t", "signature": "x"}]}]},
        {"problem": "p", "solution": "It is 5.", "answer": "5"},
        {"messages": [{"user": "q1"}, ["assistant", "a"]]},
        {"messages": [{"role": "user", "value": "q2"}, {"from": "gpt", "content": "a"}]},
        {"contents": [{"role": "user", "parts": ["q", "3"]}, {"role": "model", "parts": ["a"]}]},
    ]  # fmt: skip
    found = read(written(tmp_path / "a.json", rows))

    assert not [one for one in found if isinstance(one, BadRow)]
    assert spoken(found[0]) == [("system", "s"), *PAIR]
    assert found[1].template_kwargs == {"enable_thinking": False}
    assert [turn.train for turn in found[2].turns] == [True, False, True, True]
    assert [turn.weight for turn in found[3].turns] == [1, 0.5, 1, 0.5]
    assert found[4].turns[1] == Turn("model", "a", reasoning="r")
    assert [turn.role for turn in found[5].turns] == ["system", "human", "model", "human", "model"]
    assert spoken(found[6]) == [("system", "System"), ("human", "USER"), ("model", "ChatGPT")]
    assert spoken(found[7]) == [("system", "u"), *PAIR]
    assert found[8].turns == (Turn("text", "Plain text.", weight=2),)
    assert [one.turns[1] for one in found[9:11]] == [Turn("model", "a", reasoning=thought) for thought in "st"]
    assert spoken(found[11]) == [("human", "p"), ("model", "It is 5.")]
    for number, one in enumerate(found[12:], start=1):
        assert spoken(one) == [("human", f"q{number}"), ("model", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which word is that?", "instruction": "cat", "answer": "cat"},
        {"question": "Repeat this.", "prompt": "cat", "answer": "A cat."},
        {"problem": "p", "instruction": "5", "solution": "It is 5."},
    ],
)
def test_a_question_that_the_answer_repeats_is_not_lost(row, tmp_path):
    (fault,) = faults(written(tmp_path / "a.json", [row]))

    assert "and more texts, which would be lost" in fault


def test_other_keys_are_said_once_per_source(tmp_path):
    row = {"id": 1, "messages": [CHAT[0], {**CHAT[1], "stamp": 5}], "source_url": "x", "lang": None, "tags": []}
    path = written(tmp_path / "a.json", [row, {**good_row(2), "source_url": "y"}])
    reader = ConversationReader(find_sources(str(path)))

    assert [type(one) for one in reader] == [Conversation] * 2
    assert reader.counts.notes()[-1] == f"{path}: keys not read: source_url (2 rows), stamp of turns (1 row)"


def test_keys_of_calls_and_declarations_are_said_and_text_that_is_no_list_of_turns_stays(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}, "cache": True}]
    call = {"function": {"name": "f", "arguments": {}, "note": "n"}, "signature": "s", "index": None}
    tagged = "".join(f"<tool_call>{json.dumps({'name': 'f', **more})}</tool_call>" for more in ({}, {"why": "w"}))
    rows = [
        [CHAT[0], {"role": "assistant", "tool_calls": [call]}],
        [{"from": "human", "value": "q2"}, {"from": "function_call", "value": json.dumps(call)}],
        [{"from": "human", "value": "q3"}, {"from": "gpt", "value": tagged}],
    ]
    text = {"prompt": '[{"from": "Paris", "to": "Rome"}]', "response": json.dumps(CHAT)}
    path = written(tmp_path / "a.json", [*({"messages": row, "tools": tools} for row in rows), text])
    reader = ConversationReader(find_sources(str(path)))

    *_, one = reader
    assert spoken(one) == [("human", text["prompt"]), ("model", text["response"])]
    expected = "cache of tools (3 rows), note of calls of turns (2 rows), signature of calls of turns (2 rows)"
    assert reader.counts.notes()[-1] == f"{path}: keys not read: {expected}, why of calls (1 row)"


def test_what_cannot_be_learned_is_refused_once_per_kind_with_its_count(tmp_path):
    rows = [{"prompt": f"q{number}", "chosen": f"a{number}", "rejected": "b"} for number in range(60)]
    path = written(tmp_path / "a.json", rows)

    with pytest.raises(DataError) as raised:
        read_conversations(path)
    lines = str(raised.value).splitlines()
    assert lines[1].startswith(f'  {path}, 60 of 60 rows: has "chosen" and "rejected": preferences are not')


def test_exact_duplicates_are_left_out_by_name(tmp_path):
    path = written(tmp_path / "a.json", [good_row(0), good_row(1), good_row(0), {**good_row(1), "id": 5}])
    found = read(path, repairs=["drop_duplicates"])

    assert [isinstance(one, BadRow) for one in found] == [False, False, True, True]
    assert not any(one.is_fault for one in found[2:]) and "drop_duplicates: says the same" in found[2].reason
    assert len(read_conversations(path, repairs=["drop_duplicates"])) == 2
    assert len(faults(path)) == 3


FORMATS = [
    {"conversation": [{"human": "q", "assistant": "a"}]},
    {"conversation": [{"system": "", "input": "q", "output": "a"}]},
    {"dialog": ["q", "a"]},
    {"data": ["q", "a"]},
    {"query": "q", "answer": "a"},
    {"problem": "q", "solution": "a"},
    {"instruction": "q", "input": "", "response": "a"},
    {"messages": CHAT, "answer": "a"},
    {"messages": CHAT[:1], "answer": "a"},
    {"conversations": json.dumps(CHAT)},
    {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
    {"messages": [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "a"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, CHAT[1]]},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"conversation": [{"human": None, "assistant": None, "input": "q", "output": "a"}]},
    CHAT,
    {"messages": [json.dumps(turn) for turn in CHAT]},
    {"messages": {"role": ["user", "assistant"], "content": ["q", "a"], "name": None}},
    {"messages": [{"user": "q", "assistant": None}, {"user": None, "assistant": "a", "mood": "m"}]},
    {"Prompt": "q", "Completion": "a", "\ud800": "b"},
]


@pytest.mark.parametrize("row", FORMATS, ids=json.dumps)
def test_more_formats_are_read(row, tmp_path):
    (one,) = read(written(tmp_path / "a.json", [row]))

    assert isinstance(one, Conversation), one
    assert spoken(one) == PAIR


def test_a_line_may_be_a_list_of_turns(tmp_path):
    reader = ConversationReader(find_sources(str(written(tmp_path / "a.jsonl", f"{json.dumps(CHAT)}\n" * 2))))
    one, two = reader
    assert spoken(one) == PAIR and "says the same" in two.reason


def test_what_json_does_not_have_is_a_fault_where_it_is_read(tmp_path):
    tools = json.dumps([{"name": "f", "parameters": {"type": "object"}}])
    for value in (datetime(2026, 11, 30), b"x", float("nan")):
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": value}}}],
        }
        row = {"messages": [CHAT[0], call, {"role": "tool", "content": "r"}, CHAT[1]], "tools": tools}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path := str(tmp_path / "a.parquet"))
        assert "another value that JSON does not have" in faults(path)[0]
        pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT], "seen": [value]}), path)
        assert spoken(*read(path)) == PAIR


def test_gemini_and_bedrock_system_prompts_are_read(tmp_path):
    parts = [{"text": "s"}]
    turns = [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]
    bedrock = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"text": "a"}]}]
    rows = [{"systemInstruction": {"parts": parts}, "contents": turns}, {"system": parts, "messages": bedrock}]

    texts = [{**row, key: json.dumps(row[key])} for row in rows for key in row if key.startswith("system")]
    broken = {"system": '[{"type": "rule"}]', "messages": CHAT}

    for table in (rows, texts):
        assert [one.turns[0] for one in read(written(tmp_path / "a.json", table))] == [Turn("system", "s")] * 2
    assert 'expected "system" to be a string' in read(written(tmp_path / "b.json", [broken]))[0].reason


# ---- remote files


def test_remote_files_are_read_and_fetched_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = fsspec.filesystem("memory")
    for name in ("a", "b"):
        store.pipe(f"/bucket/{name}.json", json.dumps([good_row(ord(name))]).encode())

    assert [source.name for source in find_sources("memory://bucket/*.json:2")] == [
        "memory:///bucket/a.json", "memory:///bucket/b.json",
    ]  # fmt: skip
    assert len(read_conversations("memory://bucket/")) == 2
    assert [source.weight for source in find_sources("memory://bucket/a.json:0.5")] == [0.5]
    store.pipe("/bucket/a.json", json.dumps([good_row(1), good_row(2)]).encode())
    assert len(read_conversations("memory://bucket/a.json")) == 2
    for url, said in (("memory://bucket/z.json", "no such file"), ("nowhere://x", "no known kind of address")):
        with pytest.raises(DataError, match=said):
            find_sources(url)


def test_a_missing_package_of_a_store_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(DataError, match="s3:// needs a package that is missing: pip install s3fs"):
        find_sources("s3://bucket/a.json")


def test_a_store_that_fails_is_said_with_its_reason(monkeypatch):
    def fail(url: str) -> None:
        raise ValueError("no credentials\nin any place")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(DataError, match=r"memory://a.json: cannot be fetched \(ValueError: no credentials\): check"):
        find_sources(["memory://a.json"])
