"""Conversations with tools and reasoning are read back as written; damaged rows are refused or read rightly."""

import copy
import json
import random
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune.conversation import BadRow, Conversation, ToolCall, Turn, to_row
from tests.helpers.chat_rows import read, written
from tests.unit.dataset import test_other_sources, test_tool_rows
from tests.unit.dataset.test_reader_properties import CHECKED, ID, TEXT

MUTATIONS = 1_000
NAMES = st.sampled_from(["find_book", "读书", "a.b-c", "f"])
# What a property may be -> values that fit it.
VALUES: dict[str, Any] = {
    "string": TEXT, "integer": st.integers(-9, 9), "boolean": st.booleans(), "null": st.none(),
    "array": st.lists(st.integers(0, 3), max_size=2), "number": st.floats(-1, 1), "object": st.just({"x": {"y": None}}),
}  # fmt: skip


@st.composite
def tools_and_values(draw) -> tuple[tuple[dict, ...], dict[str, dict[str, Any]]]:
    """Declarations, and for each function the values that its arguments may have."""
    declared, values = [], {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        kinds = draw(st.dictionaries(st.sampled_from(["title", "year", "类"]), st.sampled_from([*VALUES]), max_size=3))
        properties = {key: {"type": kind, "description": draw(TEXT)} for key, kind in kinds.items()}
        schema = {"type": "object", "properties": properties, "required": [*kinds][:1]}
        function = {"name": name, "parameters": schema}
        declared.append(
            {"type": "function", "function": function | ({"description": "d"} if draw(st.booleans()) else {})}
        )
        values[name] = {key: VALUES[kind] for key, kind in kinds.items()}
    return tuple(declared), values


@st.composite
def conversations(draw) -> Conversation:
    """Conversations of all that the reader reads: tools, calls, results, reasoning, weights, raw text."""
    if draw(st.integers(0, 9)) == 0:
        return Conversation((Turn("text", draw(TEXT), weight=draw(st.sampled_from([1.0, 0.5]))),))
    tools, values = draw(tools_and_values()) if draw(st.booleans()) else ((), {})
    turns = [Turn("system", draw(TEXT))] if draw(st.booleans()) else []
    num_calls, has_ids = 0, draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("human", draw(TEXT)))
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            calls = []
            for name in draw(st.lists(st.sampled_from([*values]), min_size=1, max_size=2)):
                num_calls += 1
                arguments = {key: draw(value) for key, value in values[name].items()}
                calls.append(ToolCall(name, arguments, f"call_{num_calls}" if has_ids else None))
            said = draw(st.just("") | TEXT)
            turns.append(Turn("model", said, reasoning=draw(st.just("") | TEXT), tool_calls=tuple(calls)))
            turns += [Turn("tool", draw(TEXT), tool_call_id=call.id, tool_name=call.name) for call in calls]
        weight = draw(st.sampled_from([1.0, 1.0, 0.5, 2.0]))
        turns.append(Turn("model", draw(TEXT), draw(st.booleans()), draw(st.just("") | TEXT), weight=weight))
    turns[-1] = Turn("model", turns[-1].text)
    kwargs = draw(st.sampled_from([{}, {"enable_thinking": False}]))
    return Conversation(tuple(turns), tools=tools, template_kwargs=kwargs)


def test_what_to_row_writes_is_read_back(tmp_path):
    seen: Counter = Counter()

    @CHECKED
    @given(conversations(), ID)
    def check(conversation, own_id):
        row = to_row(conversation.turns, own_id, conversation.tools, conversation.template_kwargs)
        (one,) = read(written(tmp_path / "a.json", json.dumps([row])))

        assert isinstance(one, Conversation), one
        assert (one.turns, one.tools, one.template_kwargs) == (
            conversation.turns, conversation.tools, conversation.template_kwargs,
        )  # fmt: skip
        for before, after in zip(conversation.tools, one.tools, strict=True):
            assert json.dumps(before) == json.dumps(after), "the order of keys"
        assert one.id == own_id
        seen["calls"] += sum(len(turn.tool_calls) for turn in one.turns)
        seen["reasoning"] += any(turn.reasoning for turn in one.turns)

    check()
    assert seen["calls"] > 50 and seen["reasoning"] > 30


TOKENS = [
    None, True, False, 0, 1, 0.5, "", " ", "x", "a", "tool", "assistant", "[]", "{}", "[", [], {}, [{}], ["a"],
    {"name": "f"}, [{"type": "text", "text": "x"}], "<tool_call>", "</think>", "\ud83d", float("inf"), 10**400,
]  # fmt: skip
KEYS = (
    "role content from value tools tool_calls function arguments name id weight parameters properties type required "
    "thinking train messages text $ref replies"
).split()


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of each value in it."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in [(value, key), *places_in(child)]]


def mutate(rows: list[Any], random_: random.Random) -> None:
    """Take a value away, put another in its place, say it twice, or rename a key."""
    holder, key = random_.choice(places_in(rows))
    change = random_.randrange(4)
    if change == 0:
        del holder[key]
    elif change == 1:
        holder[key] = copy.deepcopy(random_.choice(TOKENS))
    elif change == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif isinstance(holder, dict):
        holder[random_.choice(KEYS)] = holder.pop(key)


def test_mutated_rows_give_no_traceback_and_no_text_that_is_not_theirs(tmp_path):
    random_ = random.Random("tools")
    tree = {"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a", "replies": []}]}}
    originals = [tree, *test_other_sources.FORMATS, *(row for row, _ in test_tool_rows.FORMATS.values())]
    fates: Counter = Counter()
    for _ in range(MUTATIONS):
        rows = copy.deepcopy(random_.sample(originals, 2))
        for _ in range(random_.choice([1, 1, 2, 4])):
            if places_in(rows):
                mutate(rows, random_)
        path = written(tmp_path / "a.json", json.dumps(rows))
        for one in read(path):
            fates[type(one).__name__] += 1
            if isinstance(one, BadRow):
                assert one.faults and all(fault.startswith(str(path)) and "\n" not in fault for fault in one.faults)
                continue
            assert any(turn.is_supervised for turn in one.turns)
            content = path.read_text()
            for turn in one.turns:
                lines = turn.text.split("\n")
                assert all(json.dumps(line)[1:-1] in content for line in lines) or '"text": ' in content
                assert all(call.name in content for call in turn.tool_calls)
    assert fates["BadRow"] > 300 and fates["Conversation"] > 200


def test_mutated_tables_give_no_traceback_and_no_other_text(tmp_path):
    random_ = random.Random("tools")
    content = 'question,answer,id\n"a, ""b""\nc",河流,1\nd,"e",\n\nf,g\r\n'.encode()
    fates: Counter = Counter()
    for _ in range(MUTATIONS):
        begin, end = sorted(random_.choices(range(len(content) + 1), k=2))
        token = random_.choice([b'"', b",", b"\n", b"\r", b"\0", b"\xe9", b"\xef\xbb\xbf", b"x"])
        cut, without = content[:begin], content[:begin] + content[end:]
        damaged = random_.choice([cut + token + content[begin:], cut, without])
        for one in read(path := written(tmp_path / "a.csv", damaged)):
            fates[type(one).__name__] += 1
            assert not isinstance(one, BadRow) or all(fault.startswith(str(path)) for fault in one.faults)
            for turn in one.turns if isinstance(one, Conversation) else ():
                text = damaged.decode(errors="replace")
                assert turn.text.replace('"', '""') in text or turn.text in text
    assert min(fates.values()) > 200
