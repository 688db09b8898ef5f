"""Any conversations are read back exactly; any other JSON and any bytes are refused with a place, or read rightly."""

import copy
import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.dataset.conversation_reader import read_conversations
from finetune.utils.errors import DataError
from tests.helpers.chat_rows import HELLO, LOST, spoken, turns, written

CHECKED = settings(max_examples=150, deadline=None, database=None, derandomize=True)


# ---- any data at all

SHOWN = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


TEXT = st.text(SHOWN, min_size=1, max_size=30).filter(lambda text: text.strip().strip("\u200b\u200c\u200d\u2060\ufeff"))


ID = st.none() | st.integers(-(10**6), 10**6) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


ROLE_NAMES = {"human": ["human", "user"], "model": ["model", "gpt", "assistant", "bot"], "system": ["system"]}


@st.composite
def rows_and_turns(draw) -> tuple[dict, list[tuple[str, str]]]:
    """A row as a file holds it, and what it says by role."""
    roles = ["human", "model"] * draw(st.integers(1, 4))
    roles = (["system"] if draw(st.booleans()) else []) + roles[draw(st.integers(0, 1)) :]
    said = [(role, draw(TEXT)) for role in roles]
    row = {"id": draw(ID), **turns(*((draw(st.sampled_from(ROLE_NAMES[role])), text) for role, text in said))}
    return row, said


def differ(drawn: list[tuple[dict, list]]) -> bool:
    ids = [(type(row["id"]), row["id"]) for row, _ in drawn if row["id"] is not None]
    return len(set(ids)) == len(ids) and len({tuple(said) for _, said in drawn}) == len(drawn)


different_rows = st.lists(rows_and_turns(), min_size=1, max_size=5).filter(differ)


@pytest.mark.parametrize("form", ["array", "lines"])
def test_any_valid_conversations_are_read_back_exactly(form, tmp_path):
    seen: Counter = Counter()

    @CHECKED
    @given(different_rows, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]))
    def check(drawn, ascii_only, mark):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row, _ in drawn]
        content = "[" + ",\n".join(lines) + "]" if form == "array" else "\n".join(lines)
        path = written(tmp_path / "a.json", mark + content.encode())

        read = read_conversations(path)

        assert [spoken(one) for one in read] == [said for _, said in drawn]
        assert [(one.row, one.id) for one in read] == [(place, row["id"]) for place, (row, _) in enumerate(drawn)]
        seen["rows"] += len(read)

    check()
    assert seen["rows"] > 100


WORDS = st.text() | st.sampled_from(["human", "model", "system", LOST, "\0"])


KEYS = ["id", "conversations", "from", "value", "system", "messages", "train", ""]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


@st.composite
def mutated(draw) -> Any:
    """Valid rows in which one value, anywhere, has been replaced by any JSON."""
    rows = copy.deepcopy([row for row, _ in draw(st.lists(rows_and_turns(), min_size=1, max_size=2))])
    *parents, last = draw(st.sampled_from(_places(rows)[1:]))
    node = rows
    for parent in parents:
        node = node[parent]
    node[last] = draw(WORDS | JSON)
    return rows


@pytest.mark.parametrize("form", ["array", "lines"])
def test_any_json_loads_or_is_a_data_error(form, tmp_path):
    seen: Counter = Counter()

    @CHECKED
    @given(mutated() | JSON)
    def check(value):
        lines = "\n".join(map(json.dumps, value if isinstance(value, list) else [value]))
        path = written(tmp_path / "a.json", lines if form == "lines" else json.dumps(value))
        try:
            seen["loaded"] += bool(read_conversations(path))
        except DataError as error:
            seen["refused"] += 1
            assert str(path) in str(error)

    check()
    assert seen["loaded"] > 5 and seen["refused"] > 50


def test_any_bytes_load_or_are_a_data_error(tmp_path):
    seen: Counter = Counter()
    whole = json.dumps([{"conversations": HELLO}]).encode()

    @CHECKED
    @given(st.binary(max_size=20), st.integers(0, len(whole)), st.integers(0, 9))
    def check(noise, place, lost):
        path = written(tmp_path / "a.json", whole[:place] + noise + whole[place + lost :])
        try:
            seen["loaded"] += bool(read_conversations(path))
        except DataError:
            seen["refused"] += 1

    check()
    assert seen["loaded"] and seen["refused"] > 50
