"""Rows in the layouts that published data comes in, each against what a reader of its documentation would expect."""

import json

import pytest

from finetune.conversation import BadRow, Conversation
from finetune.dataset.conversation_reader import ConversationReader
from finetune.dataset.data_sources import find_sources
from tests.helpers.chat_rows import faults, good_row, read, spoken, turns, written

PAIR = [("human", "q"), ("model", "a")]
HISTORY = [["q0", "a0"], ["q1", "a1"]]
AFTER_HISTORY = [("human", "q0"), ("model", "a0"), ("human", "q1"), ("model", "a1"), *PAIR]
WITH_SYSTEM = [("system", "s"), *PAIR]
SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

READ = [
    ({"conversations": SAID}, PAIR, "conversations of from and value (gpt as model)"),
    ({"conversations": CHAT}, PAIR, "conversations of role and content (user as human, assistant as model)"),
    ({"messages": CHAT}, PAIR, "messages of role and content (user as human, assistant as model)"),
    ({"conversation": CHAT}, PAIR, "conversation of role and content (user as human, assistant as model)"),
    ({"messages": CHAT, "prompt": "q", "prompt_id": "7"}, PAIR, "messages of role and content (user as human, assi"),
    ({"messages": CHAT, "tools": None, "system": "", "history": []}, PAIR, "messages of role and content (user as "),
    ({"messages": [{"role": "system", "content": ""}, *CHAT]}, PAIR, "messages of role and content (user as "),
    ({"conversations": SAID, "system": "s"}, WITH_SYSTEM, "conversations of from and value (gpt as model)"),
    ({"messages": CHAT, "system_prompt": "s", "system": None}, WITH_SYSTEM, "messages of role and content (user as "),
    ({"instruction": "q", "input": "", "output": "a"}, PAIR, "Alpaca (instruction, input, output)"),
    ({"instruction": "q", "output": "a"}, PAIR, "Alpaca (instruction, input, output)"),
    ({"instruction": "q", "input": None, "output": "a", "history": None}, PAIR, "Alpaca (instruction, input, output)"),
    ({"instruction": "q", "input": "x", "output": "a"}, [("human", "q\nx"), ("model", "a")], "Alpaca (instruction, i"),
    ({"instruction": "q", "output": "a", "system": "s"}, WITH_SYSTEM, "Alpaca (instruction, input, output)"),
    ({"instruction": "q", "output": "a", "history": HISTORY}, AFTER_HISTORY, "Alpaca (instruction, input, output)"),
    ({"instruction": "q", "context": "c", "response": "a"}, [("human", "q\nc"), ("model", "a")], "Dolly (instruction"),
    ({"instruction": "q", "context": "", "response": "a", "category": "x"}, PAIR, "Dolly (instruction, context, inpu"),
    ({"prompt": "q", "response": "a"}, PAIR, "pairs (prompt, response)"),
    ({"prompt": "q", "completion": "a"}, PAIR, "pairs (prompt, completion)"),
    ({"question": "q", "answer": "a"}, PAIR, "pairs (question, answer)"),
    ({"system_prompt": "s", "question": "q", "response": "a"}, WITH_SYSTEM, "pairs (question, response)"),
    ({"query": "q", "response": "a", "history": HISTORY}, AFTER_HISTORY, "pairs (query, response)"),
    ({"input": "q", "output": "a"}, PAIR, "pairs (input, output)"),
    ({"prompt": "q", "response": "a", "input": None, "output": None}, PAIR, "pairs (prompt, response)"),
    # COIG: as its loading script gives it, and its files as they are published
    ({"instruction": "", "conversations": [{"question": "q", "answer": "a"}]}, PAIR, "COIG (instruction, and conv"),
    (
        {"instruction": "i", "conversations": [{"question": "q0", "answer": "a0"}, {"question": "q", "answer": "a"}]},
        [("human", "i\nq0"), ("model", "a0"), *PAIR],
        "COIG (instruction, and conversations of question and answer)",
    ),
    (
        {"trans_instruction": "q", "trans_input": "", "trans_output": "a", "instruction": "x", "output": "y"},
        PAIR,
        "COIG, translated (trans_instruction, trans_input, trans_output)",
    ),
    (
        {"textbox_q_instruction": "i", "textbox_q_context": "", "textbox_question": "q", "textbox_answer": "B",
         "textbox_answer_analysis": "because", "grade": "x"},
        [("human", "i\nq"), ("model", "because\nB")],
        "COIG, exam (textbox_q_instruction, textbox_q_context, textbox_question, textbox_answer_analysis, textbox_ans",
    ),
    (
        {"instruction": "q", "input": "", "output": "a", "task_type": {"major": ["x"]}, "domain": ["y"],
         "answer_from": "human", "human_verified": True, "copyright": "z", "metadata": None},
        PAIR,
        "Alpaca (instruction, input, output)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected", "said"), READ)
def test_a_row_is_read_as_what_its_keys_say_and_that_is_said(row, expected, said, tmp_path):
    path = written(tmp_path / "a.json", [row])
    reader = ConversationReader(find_sources([str(path)]))

    (one,) = reader

    assert isinstance(one, Conversation), one
    assert spoken(one) == expected
    line, *_ = reader.counts.notes()
    assert line.startswith(f"{path}: 1 row read as {said}")


def test_nothing_is_said_of_rows_in_the_own_layout(tmp_path):
    system = {"conversations": [{"from": "system", "value": "s"}, *good_row(3)["conversations"]]}
    path = written(tmp_path / "a.json", [good_row(1), good_row(2), system])
    reader = ConversationReader(find_sources([str(path)]))

    assert len(list(reader)) == 3
    assert reader.counts.notes() == []
    assert reader.counts.role_names == {
        (str(path), role): count for role, count in (("human", 3), ("model", 3), ("system", 1))
    }


def test_each_reading_is_counted_by_file(tmp_path):
    alpaca = [{"instruction": f"q{number}", "output": "a"} for number in range(1_999)]
    first = written(tmp_path / "a.json", [*alpaca, good_row(0), {"instruction": "q"}])
    second = written(tmp_path / "b.jsonl", "\n".join(json.dumps({"messages": CHAT, "id": 0}) for _ in range(1)))
    reader = ConversationReader(find_sources([str(first), str(second)]))

    kinds = [type(one) for one in reader]

    assert kinds == [Conversation] * 2_000 + [BadRow, Conversation]
    assert reader.counts.notes() == [
        f"{first}: 1,999 rows read as Alpaca (instruction, input, output)",
        f"{second}: 1 row read as messages of role and content (user as human, assistant as model)",
    ]
    assert reader.counts.formats[str(first), "conversations of from and value"] == 1


REFUSED = [
    ({"conversations": SAID, "messages": CHAT}, 'has both "conversations" and "messages": leave one of them out'),
    ({"messages": CHAT, "prompt": "other"}, 'has "prompt" beside "messages", and no turn says the same'),
    ({"messages": CHAT, "answer": "42"}, 'has "answer" beside "messages", and no turn says the same'),
    ({"conversations": SAID, "history": HISTORY}, 'has "history" beside "conversations"'),
    (
        {"conversations": [{"from": "human", "role": "user", "value": "q"}, SAID[1]]},
        'turn 0: has keys of both "from" and "role": leave one of them out',
    ),
    (
        {"conversations": [{"from": "human", "value": "q", "content": "r"}, SAID[1]]},
        'turn 0: has both "content" and "value": leave one of them out',
    ),
    (
        {"conversations": [{"from": "system", "value": "t"}, *SAID], "system": "s"},
        'has a system turn and another system prompt beside the turns: leave one of them out',
    ),
    ({"conversations": SAID, "system": "s", "system_prompt": "t"}, 'has both "system" and "system_prompt"'),
    ({"conversations": SAID, "system": ["s"]}, 'expected "system" to be a string, found ["s"]'),
    ({"messages": [{"role": "tool", "content": "q"}, CHAT[1]]}, "turn 0: a tool result without a call right before it"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, 'turn 1: expected "content" to be a string'),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, CHAT[1]]},
        'turn 0: "content", part 0: only text is read',
    ),
    ({"messages": CHAT, "tools": [{"title": "f"}]}, '"tools": expected declared functions with a "name", found'),
    ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [1]}]}, 'turn 1: "tool_calls": expected calls with "name"'),
    (
        {"messages": [CHAT[0], {**CHAT[1], "content": "<think>x</think>a", "reasoning_content": "hm"}]},
        "turn 1: has reasoning beside the text and in it",
    ),
    ({"instruction": "q", "output": "a", "images": ["x.png"]}, 'has "images": only text is read'),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, 'has "chosen" and "rejected": preferences are not for'),
    ({"round_0": {"response": "{}"}, "round_1": {}}, 'has "round_0": COIG\'s rounds are not read'),
    ({"instruction": "q", "output": "a", "response": "b"}, "can be read in more than one way (instruction/input/outpu"),
    ({"question": "q", "answer": "a", "response": "b"}, "can be read in more than one way (question/answer or questio"),
    ({"question": "q", "answer": "a", "instruction": "c"}, "holds question/answer and more texts, which would be lost"),
    ({"instruction": "", "output": "a"}, '"instruction" is empty: say something or leave it out'),
    ({"instruction": "q", "input": "x", "output": " "}, '"output" is empty: say something or leave it out'),
    ({"instruction": "q", "output": None}, 'expected "output" to be a string, found null'),
    ({"instruction": "q", "input": 5, "output": "a"}, 'expected "input" to be a string, found 5'),
    ({"prompt": ["q"], "response": "a"}, 'expected "prompt" to be a string, found ["q"]'),
    ({"query": "q", "response": "a", "history": "x"}, 'expected "history" to be a list of pairs, found "x"'),
    ({"query": "q", "response": "a", "history": [["x"]]}, '"history", pair 0: expected a question and its answer'),
    ({"query": "q", "response": "a", "history": [["x", 1]]}, '"history", pair 0: expected "answer" to be a string'),
    ({"instruction": "q"}, "expected an object with"),
    ({"text": ["once upon a time"]}, 'expected "text" to be a string'),
    ({"conversations": [{"question": "q", "answer": ""}]}, 'pair 0: "answer" is empty'),
    ({"conversations": [{"question": "q", "answer": "a"}, 5]}, 'pair 1: expected an object with "question"'),
    ({"instruction": 5, "conversations": [{"question": "q", "answer": "a"}]}, 'expected "instruction" to be a string'),
    ({"textbox_question": "q", "textbox_answer": ["a"]}, 'expected "textbox_answer" to be a string, found ["a"]'),
    ({"data": [good_row(0), good_row(1)]}, 'an object whose "data" holds a list of 2 rows: write them one a line'),
]  # fmt: skip


@pytest.mark.parametrize(("row", "said"), REFUSED)
def test_a_row_that_says_more_or_less_than_can_be_read_is_refused(row, said, tmp_path):
    path = written(tmp_path / "a.json", [row])

    first, *_ = faults(path)

    assert first.removeprefix(f"{path}, row 0").lstrip(",: ").startswith(said) or said in first
    assert first.startswith(f"{path}, row 0")


def test_no_fault_of_a_row_hides_another(tmp_path):
    bad = turns(("human", "a"), ("human", "b"))
    bad |= {"tools": ["x"], "prompt": "c", "id": []}
    bad["conversations"][0]["weight"] = -2
    path = written(tmp_path / "a.json", [bad])

    said = "\n".join(faults(path))

    for word in ("tools", "prompt", '"id"', "weight", "no model turn", "second human turn"):
        assert word in said
    assert len(read(path)) == 1
