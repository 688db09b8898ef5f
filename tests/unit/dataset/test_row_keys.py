"""No key of a data row is dead: without it, or with another value, something else is read."""

import json
from typing import Any

from finetune.dataset.row_formats import PAIR_KEYS, PAIRS, SYSTEM_KEYS, TURN_LISTS, WATCHED
from finetune.dataset.row_reading import RowReading
from finetune.dataset.row_verdicts import BAD_KEYS, GOOD_KEYS, GRADES, REASONS, VERDICT_KEYS
from finetune.dataset.skip_rows import rows_to_skip
from finetune.dataset.turn_reading import READ_IN_TURNS
from tests.helpers.chat_rows import faults, turns, written


def read(row: dict[str, Any]) -> Any:
    reading = RowReading(row, "row 0")
    return reading.turns, reading.faults, reading.is_complete, reading.template_kwargs


def test_every_key_of_a_row_that_is_watched_is_read_or_refused():
    turns = [{"from": "human", "value": "a"}, {"from": "model", "value": "b"}]
    assert len(WATCHED) > 25
    beside = {key for layout in PAIRS for key in layout.ignored}
    for key in sorted(WATCHED - set(TURN_LISTS)):
        row = {"conversations": turns}
        value = key in BAD_KEYS if key in VERDICT_KEYS - {"chosen", "rejected"} - {*GRADES} else "something"
        value = 5 if key in GRADES else "length" if key in REASONS else value
        assert read({**row, key: value}) != read(row), key
    for layout in PAIRS:
        whole = {key: f"text of {key}" for key in layout.keys}
        whole |= {"answers": '{"name": "f"}'} if layout.name == "xLAM" else {}
        assert read(whole)[1] == [] and len(read(whole)[0]) == 2, layout
        for key in layout.keys - beside:
            assert read({name: text for name, text in whole.items() if name != key}) != read(whole), key
    for key in TURN_LISTS:
        assert [turn.text for turn in read({key: turns})[0]] == ["a", "b"]
    for key in SYSTEM_KEYS:
        assert read({"conversations": turns, key: "Be brief."})[0][0].role == "system"
    assert PAIR_KEYS <= WATCHED


def test_keys_that_decide_something_are_honoured_or_refused():
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

    def of(values: dict[str, Any], **row: Any) -> RowReading:
        return RowReading({"messages": [asked, answer | values], **row}, "row 0")

    assert of({}, enable_thinking=False).template_kwargs == {"enable_thinking": False}
    assert of({}, enable_thinking="False").template_kwargs == {"enable_thinking": False}
    assert 'expected "enable_thinking" to be true or false' in of({}, enable_thinking="off").faults[0]
    assert [turn.train for turn in of({"loss_mask": 0}).turns] == [True, False]
    assert of({}, weight="0.5").turns[1].weight == of({"weight": "0.5"}).turns[1].weight == 0.5
    for key, value in {"mask": True, "partial": True, "channel": "analysis"}.items():
        assert of({key: value}).faults and not of({key: None}).faults, key
    assert sorted(of({"seen": 0}, parallel_tool_calls=False, level="", tags=[]).unread) == [
        "parallel_tool_calls", "seen of turns",
    ]  # fmt: skip
    results = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "r"}], "name": "Ann"}
    assert RowReading({"messages": [asked, answer, results]}, "row 0").unread == ["name of turns"]


def test_reasoning_without_an_end_or_an_answer_is_a_fault(tmp_path):
    texts = "<think>cut", "<think>r</think>", "<think>r</think>a"
    path = written(tmp_path / "a.json", [turns(("human", text), ("model", text)) for text in texts])
    assert [fault.partition("turn 1: ")[2][:20] for fault in faults(path)] == [
        "begins with <think> ",
        "has reasoning and no",
    ]


def test_every_key_of_a_turn_that_is_read_changes_what_is_read_or_is_refused():
    plain = {"role": "assistant", "content": "b"}
    before = [{"role": "user", "content": "a"}]
    for key in sorted(READ_IN_TURNS - {"role", "content", "name"}):
        value = key in BAD_KEYS if key in {"train", *GOOD_KEYS, *BAD_KEYS} else "length" if key in REASONS else 0.5
        assert read({"messages": [*before, {**plain, key: value}]}) != read({"messages": [*before, plain]}), key
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    result = {"role": "tool", "content": "c"}
    assert read({"messages": [call, {**result, "name": "f"}]}) != read({"messages": [call, result]})


def test_both_keys_of_a_line_of_skip_rows_are_read(tmp_path):
    def skipped(**line: Any) -> Any:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"source": "a.json", "row": 1, "text": "x", **line}))
        return rows_to_skip([str(tmp_path / "rows.jsonl")], {"a.json": 5, "b.json": 5})

    assert skipped() == (("a.json", 1),)
    assert skipped(source="b.json") == (("b.json", 1),)
    assert skipped(row=2) == (("a.json", 2),)
