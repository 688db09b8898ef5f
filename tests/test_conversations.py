from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.conversations import Conversation, Turn, load_conversations, shipped_files
from finetune.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
CHECKED = settings(max_examples=150, deadline=None, database=None, derandomize=True)
HELLO = [{"from": "human", "value": "Hello"}, {"from": "model", "value": "Hi!"}]


def turns(*pairs: tuple[Any, Any]) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def written(path: Path, content: Any) -> Path:
    """Bytes and text as they are, anything else as JSON."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as raised:
        load_conversations(path)
    return str(raised.value)


# ---- what is read


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"id": 7, "conversations": HELLO}, {"conversations": HELLO}]),
        json.dumps([{"id": 7, "conversations": HELLO}, {"conversations": HELLO}], indent=2),
        "\n\n" + json.dumps([{"id": 7, "conversations": HELLO}, {"conversations": HELLO}]),
        json.dumps({"id": 7, "conversations": HELLO}) + "\n" + json.dumps({"conversations": HELLO}),
        json.dumps({"id": 7, "conversations": HELLO}) + "\r\n\r\n  " + json.dumps({"conversations": HELLO}) + "\r\n",
    ],
    ids=["array", "indented", "after-blank-lines", "lines", "windows-lines"],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_an_array_and_json_lines_say_the_same(content, mark, tmp_path):
    path = written(tmp_path / "a.json", mark + content.encode())

    said = (Turn("human", "Hello"), Turn("model", "Hi!"))
    assert load_conversations(path) == [Conversation(said, 0, str(path), 7), Conversation(said, 1, str(path), None)]


def test_one_object_on_one_line_is_one_row(tmp_path):
    assert len(load_conversations(written(tmp_path / "a.jsonl", {"conversations": HELLO}))) == 1


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "human"), ("user", "human"), ("model", "model"), ("gpt", "model"), ("assistant", "model")],
)
def test_each_alias_is_read_as_its_role(name, role, tmp_path):
    before = [] if role == "human" else [("human", "a")]
    after = [] if role == "model" else [("model", "b")]
    path = written(tmp_path / "a.json", [turns(*before, (name, "x"), *after)])

    assert Turn(role, "x") in load_conversations(path)[0].turns


@pytest.mark.parametrize(
    "roles",
    [["model"], ["model", "human", "model"], ["system", "model"], ["system", "human", "model"], ["human", "model"] * 9],
)
def test_a_row_may_begin_with_any_side_and_end_with_the_model(roles, tmp_path):
    path = written(tmp_path / "a.json", [turns(*((role, "x") for role in roles))])

    assert [turn.role for turn in load_conversations(path)[0].turns] == roles


def test_text_is_kept_to_the_last_character(tmp_path):
    text = "  <|im_end|>\u2028\x85\r\n\ttail\x00 \U0001f600 "
    path = written(tmp_path / "a.jsonl", json.dumps(turns(("human", "q"), ("model", text)), ensure_ascii=False))

    assert load_conversations(path)[0].turns[1].text == text


def test_the_shipped_files_are_read():
    files = shipped_files()

    assert [file.parent for file in files] == [ROOT / "data"] * 2
    for file in files:
        assert len(load_conversations(file)) > 10


# ---- what is refused, and where

LOST = chr(0xD83D)  # half of an emoji
ROW_FAULTS = [
    (5, 'expected an object with "conversations", found 5'),
    (None, 'expected an object with "conversations", found null'),
    ([HELLO], 'expected an object with "conversations", found [[{"from"'),
    ({"id": 1, "turns": HELLO}, 'expected "conversations" to be a list of turns, found the keys id, turns'),
    ({}, 'expected "conversations" to be a list of turns, found the keys none'),
    ({"conversations": "hi"}, 'expected "conversations" to be a list of turns, found "hi"'),
    ({"conversations": []}, "has no model turn: there is nothing to learn from it"),
    (turns(("human", "a")), "has no model turn: there is nothing to learn from it"),
    (turns(("system", "a"), ("human", "b")), "has no model turn: there is nothing to learn from it"),
]
TURN_FAULTS = [
    ({"conversations": [*HELLO, 7]}, 2, 'expected an object with "from" and "value", found 7'),
    (
        turns(("bot", "a"), ("model", "b")),
        0,
        'expected "from" to be human, model or system, found "bot" (accepted as human: user; as model: gpt, assistant)',
    ),
    (turns(("human", "a"), ("Model", "b")), 1, 'expected "from" to be human, model or system, found "Model"'),
    (turns((["human"], "a"), ("model", "b")), 0, 'expected "from" to be human, model or system, found ["human"]'),
    ({"conversations": [{"value": "a"}]}, 0, 'expected "from" to be human, model or system, found null'),
    (turns(("human", "a"), ("model", 5)), 1, 'expected "value" to be a string, found 5'),
    ({"conversations": [{"from": "human"}]}, 0, 'expected "value" to be a string, found null'),
    (turns(("human", "a"), ("model", "")), 1, '"value" is empty: say something or leave the turn out'),
    (turns(("human", " \n\t\u3000"), ("model", "b")), 0, '"value" is empty'),
    (
        turns(("human", f"ab{LOST}c"), ("model", "b")),
        0,
        '"value" holds half a character (a lone surrogate) at position 2',
    ),
    (turns(("human", "a"), ("system", "b"), ("model", "c")), 1, "a system turn can only be the first"),
    (turns(("system", "a"), ("system", "b"), ("model", "c")), 1, "a system turn can only be the first"),
    (turns(("human", "a"), ("human", "b"), ("model", "c")), 1, "a second human turn in a row: merge the two"),
    (turns(("human", "a"), ("model", "b"), ("gpt", "c")), 2, "a second model turn in a row: merge the two"),
    (turns(("human", "a"), ("model", "b"), ("human", "c")), 2, "the last turn is human, nobody answers it"),
]


@pytest.mark.parametrize(
    ("row", "place", "said"),
    [(row, "row 1", said) for row, said in ROW_FAULTS]
    + [(row, f"row 1, turn {turn}", said) for row, turn, said in TURN_FAULTS],
)
@pytest.mark.parametrize("form", ["array", "lines"])
def test_a_fault_names_file_row_and_turn(row, place, said, form, tmp_path):
    rows = [{"conversations": HELLO}, row, {"conversations": HELLO}]
    path = written(tmp_path / "a.json", rows if form == "array" else "\n".join(map(json.dumps, rows)))

    message = refusal(path)

    assert message.startswith(f"{path}, {place}: {said}")
    assert "\n" not in message


def test_a_long_value_is_shown_shortened(tmp_path):
    message = refusal(written(tmp_path / "a.json", [turns(("human", "a"), ("model", ["x" * 5_000]))]))

    assert "xxx..." in message
    assert len(message) < 250


def test_every_fault_of_a_file_is_collected(tmp_path):
    rows = [
        turns(("bot", ""), ("model", 5)),
        {"conversations": HELLO},
        turns(("human", "a"), ("human", "b")),
        turns(("human", "a"), ("human", "b"), ("model", "c"), ("human", "d")),
    ]
    path = written(tmp_path / "a.json", rows)

    places = [line.strip().removeprefix(f"{path}, ").partition(": ")[0] for line in refusal(path).splitlines()[1:]]

    assert places == ["row 0, turn 0", "row 0, turn 0", "row 0, turn 1", "row 2", "row 3, turn 1", "row 3, turn 3"]


def test_the_first_20_faults_are_shown_and_all_are_counted(tmp_path):
    path = written(tmp_path / "a.json", [{"conversations": HELLO}] + [turns(("human", "a"))] * 1_250)

    lines = refusal(path).splitlines()

    assert lines[0].startswith("1,250 fault")
    assert [line.partition(", ")[2].partition(":")[0] for line in lines[1:21]] == [f"row {row}" for row in range(1, 21)]
    assert lines[21:] == ["  ... and 1,230 more"]


def test_one_row_with_three_faults_is_not_three_faulty_rows(tmp_path):
    path = written(tmp_path / "a.json", [{"conversations": [1, 2, 3]}, {"conversations": HELLO}])

    message = refusal(path)

    assert message.count("row 0, turn ") == 3
    assert "3 faulty rows" not in message


def test_each_line_that_is_not_json_is_named_beside_the_faulty_rows(tmp_path):
    good = json.dumps({"conversations": HELLO})
    path = written(tmp_path / "a.jsonl", f'{good}\n{{"conversations": [}}\n\n{good}\n{{"id": 1}}\n{good},\n')

    lines = refusal(path).splitlines()

    assert len(lines) == 4
    assert lines[1].startswith(f"  {path}, line 2, column 20: not JSON: ")
    assert lines[2].startswith(f"  {path}, row 3: expected ")
    assert lines[3].startswith(f"  {path}, line 6, column {len(good) + 1}: not JSON: ")


# ---- files that cannot be read at all


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": the file is empty"),
        (" \n\t\n", ": the file is empty"),
        (b"\xef\xbb\xbf", ": the file is empty"),
        ("[]", ": holds no conversations"),
        (b'[{"id": "\xe9"}]', ": not UTF-8 at byte 9"),
        ("[{}".encode("utf-16"), ": not UTF-8 at byte 0"),
        ('[\n  {"id": 1,}\n]', ", line 2, column 12: not JSON: "),
        ("[{}] []", ", line 1, column 6: not JSON: "),
        ('{\n  "conversations": []\n}', ", line 1, column 2: expected a JSON array of conversations, or one JSON obj"),
        ("human: hello\nmodel: hi", ", line 1, column 1: expected a JSON array of conversations, or one JSON obj"),
        ("[" * 100_000, ": not a list of conversations: nested too deeply"),
        ('{"a":' * 100_000, ""),
        ('[{"id": ' + "1" * 5_000 + "}]", ""),
        ('{"id": ' + "1" * 5_000 + "}", ""),
    ],
    ids=[
        "empty", "blank", "only-BOM", "no-rows", "latin-1", "utf-16", "comma", "two-arrays", "one-indented-object",
        "prose", "deep-array", "deep-line", "digits-in-array", "digits-in-line",
    ],
)  # fmt: skip
def test_an_unreadable_file_is_refused_with_its_place(content, said, tmp_path):
    path = written(tmp_path / "a.json", content)

    assert refusal(path).startswith(f"{path}{said}")


def test_a_value_of_any_depth_is_a_data_error(tmp_path):
    """Somewhere on the way to the recursion limit a value can still be read, but no longer be shown."""
    path = tmp_path / "a.json"
    messages = set()
    for depth in range(700, 1_001):
        message = refusal(written(path, '[{"conversations": [' + "[" * depth + "]" * depth + "]}]"))
        assert message.startswith(str(path))
        messages.add(message)

    assert len(messages) > 1


def test_a_missing_file_names_those_that_are_shipped(tmp_path):
    message = refusal(tmp_path / "mine.json")

    assert message.startswith(f"{tmp_path / 'mine.json'}: there is no such file; ")
    for name in ("identity.json", "conversations.json"):
        assert str(ROOT / "data" / name) in message


def test_the_file_of_the_published_command_is_known_not_to_be_shipped():
    message = refusal(Path("finetune/data/coig_10k.json"))

    assert message.startswith("finetune/data/coig_10k.json: COIG's 10,000 conversations are not part of this project; ")
    assert str(ROOT / "data" / "identity.json") in message


def test_a_folder_is_not_a_file(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: is a folder: name a file in it"


def test_a_name_longer_than_any_file_s_is_a_missing_file():
    assert "there is no such file" in refusal(Path("x" * 300))


# ---- any data at all

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
ID = st.none() | st.integers(-(10**6), 10**6) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
ROLE_NAMES = {"human": ["human", "user"], "model": ["model", "gpt", "assistant"], "system": ["system"]}


@st.composite
def rows_and_turns(draw) -> tuple[dict, list[tuple[str, str]]]:
    """A row as a file holds it, and what it says by role."""
    roles = ["human", "model"] * draw(st.integers(1, 4))
    roles = (["system"] if draw(st.booleans()) else []) + roles[draw(st.integers(0, 1)) :]
    said = [(role, draw(TEXT)) for role in roles]
    row = {"id": draw(ID), **turns(*((draw(st.sampled_from(ROLE_NAMES[role])), text) for role, text in said))}
    return row, said


@pytest.mark.parametrize("form", ["array", "lines"])
def test_any_valid_conversations_are_read_back_exactly(form, tmp_path):
    seen: Counter = Counter()

    @CHECKED
    @given(st.lists(rows_and_turns(), min_size=1, max_size=5), st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]))
    def check(drawn, ascii_only, mark):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row, _ in drawn]
        content = "[" + ",\n".join(lines) + "]" if form == "array" else "\n".join(lines)
        path = written(tmp_path / "a.json", mark + content.encode())

        read = load_conversations(path)

        assert [[(turn.role, turn.text) for turn in one.turns] for one in read] == [said for _, said in drawn]
        assert [(one.row, one.id) for one in read] == [(place, row["id"]) for place, (row, _) in enumerate(drawn)]
        seen["rows"] += len(read)

    check()
    assert seen["rows"] > 100


WORDS = st.text() | st.sampled_from(["human", "model", "system", LOST, "\0"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "conversations", "from", "value", ""]), inner, max_size=3)
    ),
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
            seen["loaded"] += bool(load_conversations(path))
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
            seen["loaded"] += bool(load_conversations(path))
        except DataError:
            seen["refused"] += 1

    check()
    assert seen["loaded"] and seen["refused"] > 50
