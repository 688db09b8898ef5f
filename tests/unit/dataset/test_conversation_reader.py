"""Reading conversations: formats, faults and their places, duplicates, supervised turns and weights."""

import json

import pytest

from finetune.conversation import BadRow, Conversation, Turn, answer_numbers
from finetune.dataset.conversation_reader import ConversationReader, read_conversations
from finetune.dataset.data_sources import find_sources, shipped_files
from finetune.dataset.json_decoder import shown
from finetune.dataset.row_faults import RowFaults
from tests.helpers.chat_rows import HELLO, LOST, faults, good_row, read, refusal, turns, written
from tests.helpers.paths import ROOT

FIRST, SECOND = {"id": 7, "conversations": HELLO}, turns(("human", "And you?"), ("model", "Well."))


# ---- what is read


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([FIRST, SECOND]),
        json.dumps([FIRST, SECOND], indent=2),
        json.dumps([FIRST, SECOND], indent=0),
        "\n\n" + json.dumps([FIRST, SECOND]),
        json.dumps(FIRST) + "\n" + json.dumps(SECOND),
        json.dumps(FIRST) + "\r\n\r\n  " + json.dumps(SECOND) + "\r\n",
    ],
    ids=["array", "indented", "indent-0", "after-blank-lines", "lines", "windows-lines"],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_an_array_and_json_lines_say_the_same(content, mark, tmp_path):
    path = written(tmp_path / "a.json", mark + content.encode())

    assert read_conversations(path) == [
        Conversation((Turn("human", "Hello"), Turn("model", "Hi!")), 0, str(path), 7),
        Conversation((Turn("human", "And you?"), Turn("model", "Well.")), 1, str(path), None),
    ]


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_one_object_is_one_row(indent, tmp_path):
    assert len(read_conversations(written(tmp_path / "a.json", json.dumps(FIRST, indent=indent)))) == 1


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "human"),
        ("user", "human"),
        ("model", "model"),
        ("gpt", "model"),
        ("assistant", "model"),
        ("bot", "model"),
    ],
)
def test_each_alias_is_read_as_its_role(name, role, tmp_path):
    before = [] if role == "human" else [("human", "a")]
    after = [] if role == "model" else [("model", "b")]
    path = written(tmp_path / "a.json", [turns(*before, (name, "x"), *after)])

    assert Turn(role, "x") in read_conversations(path)[0].turns


@pytest.mark.parametrize(
    "roles",
    [["model"], ["model", "human", "model"], ["system", "model"], ["system", "human", "model"], ["human", "model"] * 9],
)
def test_a_row_may_begin_with_any_side_and_end_with_the_model(roles, tmp_path):
    path = written(tmp_path / "a.json", [turns(*((role, "x") for role in roles))])

    assert [turn.role for turn in read_conversations(path)[0].turns] == roles


def test_text_is_kept_to_the_last_character(tmp_path):
    text = "  <|im_end|>\u2028\x85\r\n\ttail \U0001f600 "
    path = written(tmp_path / "a.jsonl", json.dumps(turns(("human", "q"), ("model", text)), ensure_ascii=False))

    assert read_conversations(path)[0].turns[1].text == text


def test_the_shipped_files_are_read():
    files = shipped_files()

    assert [file.parent for file in files] == [ROOT / "data"] * 2
    for file in files:
        assert len(read_conversations(file)) > 10


# ---- what is refused, and where


ROW_FAULTS = [
    (5, 'expected an object with "conversations", found 5'),
    (None, 'expected an object with "conversations", found null'),
    ([HELLO], 'expected an object with "conversations", found [[{"from"'),
    ({"id": 1, "talk": "hi"}, 'expected an object with "conversations" (or another format that is read: '),
    ({"conversations": None}, 'expected "conversations" to be a list of turns, found null'),
    ({"conversations": {"from": "human"}}, 'expected "conversations" to be a list of turns, found {"from": "human"}'),
    ({"id": {}, **SECOND}, 'expected "id" to be a string or a number, found {}'),
    ({"id": [1], **SECOND}, 'expected "id" to be a string or a number, found [1]'),
    ({"id": LOST, **SECOND}, '"id" holds half a character (a lone surrogate)'),
    ({"conversations": "hi"}, 'expected "conversations" to be a list of turns, found "hi"'),
    ({"conversations": []}, "has no turns: there is nothing to learn from it"),
    (turns(("human", "a")), "has no model turn: there is nothing to learn from it"),
    (turns(("system", "a"), ("human", "b")), "has no model turn: there is nothing to learn from it"),
]


TURN_FAULTS = [
    ({"conversations": [*HELLO, 7]}, 2, 'expected an object with "from" and "value", found 7'),
    (
        turns(("robot", "a"), ("model", "b")),
        0,
        'expected "from" to be human, model, system or tool, found "robot" (accepted as human: user; as model: ',
    ),
    (turns(("human", "a"), ("Modell", "b")), 1, 'expected "from" to be human, model, system or tool, found "Modell"'),
    (turns((["human"], "a"), ("model", "b")), 0, 'expected "from" to be human, model, system or tool, found ["human"]'),
    ({"conversations": [{"value": "a"}]}, 0, 'expected "from" to be human, model, system or tool, found null'),
    (turns(("human", "a"), ("model", 5)), 1, 'expected "value" to be a string, found 5'),
    ({"conversations": [{"from": "human"}]}, 0, 'expected "value" to be a string, found null'),
    (turns(("human", "a"), ("model", "")), 1, '"value" is empty: say something or leave it out'),
    (turns(("human", " \n\t\u3000"), ("model", "b")), 0, '"value" is empty'),
    (turns(("human", "a"), ("model", "\u200b\ufeff ")), 1, '"value" is empty'),
    (turns(("human", "a\0b"), ("model", "b")), 0, '"value" holds a NUL character at position 1'),
    (turns(("human", "a"), ("model", ["b"])), 1, 'expected "value" to be a string, found ["b"]'),
    (turns(("human", "a"), ("model", {"b": 1})), 1, 'expected "value" to be a string, found {"b": 1}'),
    (turns(("human ", "a"), ("model", "b")), 0, 'expected "from" to be human, model, system or tool, found "human "'),
    (
        turns(("human", f"ab{LOST}c"), ("model", "b")),
        0,
        '"value" holds half a character (a lone surrogate) at position 2',
    ),
    (turns(("human", "a"), ("model", "b"), ("system", "c")), 2, "the last turn is system, nobody answers it"),
    (turns(("human", "a"), ("system", "b"), ("human", "c"), ("model", "d")), 2, "a second human turn in a row"),
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
    rows = [good_row(0), row, good_row(2)]
    path = written(tmp_path / "a.json", rows if form == "array" else "\n".join(map(json.dumps, rows)))

    before, bad, behind = read(path)

    assert (before.row, behind.row) == (0, 2)
    assert isinstance(bad, BadRow) and (bad.row, bad.source) == (1, str(path))
    assert bad.faults[0].startswith(f"{path}, {place}: {said}")
    assert all(fault.startswith(f"{path}, row 1") and "\n" not in fault for fault in bad.faults)
    assert refusal(path).partition("\n  ")[2].startswith(bad.faults[0]) or refusal(path) == bad.faults[0]


def test_a_long_value_is_shown_shortened(tmp_path):
    message = refusal(written(tmp_path / "a.json", [turns(("human", "a"), ("model", ["x" * 5_000]))]))

    assert "xxx..." in message
    assert len(message) < 250


def test_every_fault_of_a_file_is_collected(tmp_path):
    rows = [
        turns(("robot", ""), ("model", 5)),
        good_row(1),
        turns(("human", "a"), ("human", "b")),
        turns(("human", "a"), ("human", "b"), ("model", "c"), ("human", "d")),
    ]
    path = written(tmp_path / "a.json", rows)

    places = [line.strip().removeprefix(f"{path}, ").partition(": ")[0] for line in refusal(path).splitlines()[1:]]

    expected = ["row 0, turn 0", "row 0, turn 0", "row 0, turn 1", "row 2", "row 2, turn 1", "row 3, turn 1"]
    assert places == [*expected, "row 3, turn 3"]


def test_faults_of_one_kind_are_one_line_with_an_example_and_the_count(tmp_path):
    bad = [{"conversations": f"a{number}"} for number in range(1_250)]
    path = written(tmp_path / "a.json", [good_row(0), *bad])

    lines = refusal(path).splitlines()

    said = 'expected "conversations" to be a list of turns, found "a0" (row 1, row 2'
    assert lines[0] == "1,250 faults:" and len(lines) == 2
    assert lines[1].startswith(f"  {path}, 1,250 of 1,251 rows: {said}") and lines[1].endswith("and 1,240 more)")


def test_rows_are_counted_where_a_row_has_several_faults_of_a_kind(tmp_path):
    bad = [turns(("human", 5), ("model", 5)) for _ in range(6)]
    path = written(tmp_path / "a.json", [good_row(0), *bad])

    assert f"{path}, 6 of 7 rows: " in refusal(path) and "row 1, turn 0, row 1, turn 1, row 2" in refusal(path)


def test_what_many_rows_share_is_shown_once_with_its_count_and_first_places(tmp_path):
    bad = [{**good_row(number), "label": False} for number in range(1, 60)]
    path = written(tmp_path / "a.json", [good_row(0), *bad, {}])

    lines = refusal(path).splitlines()

    places = ", ".join(f"row {number}" for number in range(1, 11))
    assert lines[0] == "60 faults:" and len(lines) == 3
    assert lines[1].startswith(f'  {path}, 59 of 61 rows: "label": false')
    assert lines[1].endswith(f"({places} and 49 more)")
    assert lines[2].startswith(f"  {path}, row 60: ")


def test_one_row_with_three_faults_is_not_three_faulty_rows(tmp_path):
    path = written(tmp_path / "a.json", [{"conversations": [1, 2, 3]}, good_row(0)])

    message = refusal(path)

    assert message.count("row 0, turn ") == 3
    assert "3 faulty rows" not in message


@pytest.mark.parametrize(
    ("literal", "said"),
    [
        ('"points": NaN', 'row 1, "points": holds NaN, which is not JSON: write null, or leave it out'),
        ('"a": {"b": [1, -Infinity]}', 'row 1, "a", "b", 1: holds -Infinity, which is not JSON'),
        ('"points": Infinity', 'row 1, "points": holds Infinity, which is not JSON'),
        (f'"points": {"7" * 5_000}', 'row 1, "points": holds a number of more than 4,300 digits'),
        ('"points": 1, "points": 1', 'row 1: has "points" twice: only one of them could be read, take one out'),
        ('"a": [{"b": 1, "b": 2}]', 'row 1, "a", 0: has "b" twice'),
    ],
    ids=["nan", "minus-infinity", "infinity", "digits", "twice", "twice-deep"],
)
@pytest.mark.parametrize("form", ["array", "lines"])
def test_what_json_would_read_in_silence_is_the_fault_of_its_row_alone(literal, said, form, tmp_path):
    bad = json.dumps(good_row(1)).replace('{"id"', f'{{{literal}, "id"', 1)
    lines = [json.dumps(good_row(0)), bad, json.dumps(good_row(2))]
    path = written(tmp_path / "a.json", "\n".join(lines) if form == "lines" else f"[{','.join(lines)}]")

    assert [one.row for one in read(path) if isinstance(one, Conversation)] == [0, 2]
    (fault,) = faults(path)
    assert fault.startswith(f"{path}, {said}")


def test_a_key_that_stands_twice_in_a_turn_is_named_with_the_turn(tmp_path):
    path = written(
        tmp_path / "a.json",
        '[{"conversations": [{"from": "human", "value": "a", "value": "b"}, {"from": "model", "value": NaN}]}]',
    )

    assert faults(path) == [
        f'{path}, row 0, turn 0: has "value" twice: only one of them could be read, take one out',
        f'{path}, row 0, turn 1, "value": holds NaN, which is not JSON: write null, or leave it out',
        f'{path}, row 0, turn 1: expected "value" to be a string, found NaN: write it as text, or leave the row out',
    ]


# ---- the same twice


def test_a_row_that_says_the_same_as_another_is_refused_and_the_first_is_named(tmp_path):
    first = written(tmp_path / "a.json", [good_row(0), good_row(1), {**good_row(0), "id": "again"}])
    second = written(tmp_path / "b.jsonl", json.dumps(good_row(2)) + "\n" + json.dumps({**good_row(1), "id": 9}))

    assert faults(first, second) == [
        f"{first}, row 2: says the same as {first}, row 0: take one of them out, or use --repairs drop_duplicates",
        f"{second}, row 1: says the same as {first}, row 1: take one of them out, or use --repairs drop_duplicates",
    ]


def test_ids_are_unique_within_a_file_and_1_is_not_its_name(tmp_path):
    rows = [{**good_row(number), "id": own} for number, own in enumerate([1, "1", 1.0, None, None, "1", 1, True])]
    first = written(tmp_path / "a.json", rows)
    second = written(tmp_path / "b.json", [{**good_row(99), "id": 1}])

    assert [fault.removeprefix(f"{first}, ") for fault in faults(first, second)] == [
        'row 5: has the id "1" of row 1 in the same data: give each row its own',
        "row 6: has the id 1 of row 0 in the same data: give each row its own",
    ]


def test_a_bad_row_gives_way_to_a_good_one_that_says_the_same(tmp_path):
    same = good_row(0)
    path = written(tmp_path / "a.json", [{**same, "tools": ["a"]}, same, {**same, "tools": ["b"]}])

    kept = [one.row for one in read(path) if isinstance(one, Conversation)]

    assert kept == [1]
    assert [fault.partition(": ")[0].removeprefix(f"{path}, ") for fault in faults(path)] == ["row 0"] + ["row 2"] * 3


def numbers_of(*roles: str) -> list[int]:
    return [*answer_numbers(dict(enumerate(roles))).values()]


def test_what_is_said_behind_a_human_turn_is_one_answer():
    assert numbers_of(*["human", "model"] * 3) == numbers_of("system", *["human", "model"] * 3) == [1, 2, 3]
    assert numbers_of("model", "human", "model", "human", "model") == [1, 1, 2], "a greeting answers nothing"
    assert numbers_of("human", "model", "tool", "tool", "model", "human", "model") == [1, 1, 2]
    assert numbers_of("text") == [1]


def test_of_many_kinds_of_faults_the_first_are_shown_as_they_are():
    kinds = "abcdefghijklmnopqrstuvw"
    lines = RowFaults(f"{kind}.json: holds no conversations" for kind in kinds).message().splitlines()
    assert lines[0] == "23 faults:" and len(lines) == 22
    assert lines[1] == "  a.json: holds no conversations" and lines[-1] == "  ... and 3 more"


def test_a_value_of_many_levels_is_named_by_its_kind():
    nested: list = []
    for _ in range(20_000):
        nested = [nested]
    assert shown(nested) == "a list of many levels"


def test_an_empty_file_is_read_at_once(tmp_path):
    reader = ConversationReader(find_sources([str(written(tmp_path / "a.json", b""))]))
    assert [one.faults for one in reader] == [
        (f"{tmp_path / 'a.json'}: the file is empty: expected a JSON array of conversations",)
    ]
    assert reader.share_read() == 1.0
