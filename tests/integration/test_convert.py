"""Any layout becomes the project's own JSON, whole or not at all, and reads back the same."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.cli import convert, preview
from finetune.conversation import Conversation
from finetune.dataset.conversation_reader import read_conversations
from finetune.utils.errors import ConfigError, DataError, StorageError
from tests.helpers.chat_rows import read
from tests.helpers.rows import ROWS, write_rows
from tests.helpers.verbs import finetune_text
from tests.unit.dataset.test_tool_rows import FORMATS

ALPACA = {"instruction": "Translate.", "input": "Hello", "output": "你好"}
MESSAGES = {
    "id": "m1",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "5", "train": False},
        {"role": "user", "content": 'A "quoted"\n</s>\u2028line?'},
        {"role": "assistant", "content": "Yes 👩‍👧"},
    ],
}
BAD = {"conversations": [{"from": "human", "value": "Nobody answers"}]}
TRAILING = {"conversations": [*[{"from": role, "value": role} for role in ("human", "model", "human")]]}


def written(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*words) -> None:
    convert.main([str(word) for word in words])


def turns(path) -> list:
    return [one.turns for one in read_conversations([str(path)])]


def test_an_array_with_one_readable_row_a_line(tmp_path, capsys):
    source = written(tmp_path / "in.jsonl", [ALPACA, MESSAGES])
    run(source, tmp_path / "out.json")
    lines = (tmp_path / "out.json").read_text("utf-8").split("\n")
    assert (lines[0], lines[3:]) == ("[", ["]", ""])
    assert lines[1] == (
        '{"conversations": [{"from": "human", "value": "Translate.\\nHello"}, {"from": "model", "value": "你好"}]},'
    )
    second = json.loads(lines[2])
    assert second["id"] == "m1"
    assert second["conversations"] == [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2+3?"},
        {"from": "model", "value": "5", "train": False},
        {"from": "human", "value": 'A "quoted"\n</s>\u2028line?'},
        {"from": "model", "value": "Yes 👩‍👧"},
    ]
    out = capsys.readouterr().out
    assert re.search(r"in\.jsonl: 1 rows? read as Alpaca", out)
    assert out.endswith("out.json: 2 rows\n")


def test_json_lines_by_name(tmp_path):
    run(written(tmp_path / "in.jsonl", [ALPACA, MESSAGES]), tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text("utf-8").split("\n")
    assert len(lines) == 3 and lines[-1] == ""
    assert "id" not in json.loads(lines[0]) and json.loads(lines[1])["id"] == "m1"


@pytest.mark.parametrize("endings", [("json", "json"), ("jsonl", "json"), ("json", "jsonl")])
def test_what_was_converted_converts_to_itself(tmp_path, endings):
    source = written(tmp_path / "in.jsonl", [ALPACA, MESSAGES])
    first, second = (tmp_path / f"{number}.{ending}" for number, ending in enumerate(endings))
    run(source, first)
    run(first, second)
    assert turns(source) == turns(first) == turns(second)
    if endings[0] == endings[1]:
        assert first.read_bytes() == second.read_bytes()
    else:
        run(second, tmp_path / f"again.{endings[0]}")
        assert (tmp_path / f"again.{endings[0]}").read_bytes() == first.read_bytes()


def test_tools_reasoning_weights_and_text_survive(tmp_path):
    rows = [copy.deepcopy(row) for row, _ in FORMATS.values()][::4]
    rows += [{"text": "Plain.", "weight": 0.5}, {"messages": [{"role": "user", "content": "x"}], "answer": "y"}]
    rows[0]["messages"][-1] |= {"reasoning_content": "r", "weight": 2}
    rows[0]["chat_template_kwargs"] = {"enable_thinking": False}
    source = written(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out.json", "--repairs", "drop_duplicates")
    kept = [one for one in read(source, repairs=["drop_duplicates"]) if isinstance(one, Conversation)]
    again = read(tmp_path / "out.json")
    assert len(again) == len(kept) > 4
    for one, other in zip(kept, again, strict=True):
        assert (one.turns, one.tools, one.template_kwargs) == (other.turns, other.tools, other.template_kwargs)


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=20).map("a{}".format)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4, unique=True), st.one_of(st.integers(), texts))
def test_every_text_survives(tmp_path, pairs, id):
    rows = [
        {
            "id": f"{id} {number}" if number else id,
            "conversations": [{"from": "user", "value": one}, {"from": "gpt", "value": other}],
        }
        for number, (one, other) in enumerate(pairs)
    ]
    out = tmp_path / "out.json"
    out.unlink(missing_ok=True)
    run(written(tmp_path / "in.jsonl", rows), out)
    found = json.loads(out.read_bytes())
    assert [tuple(turn["value"] for turn in row["conversations"]) for row in found] == pairs
    assert [row["id"] for row in found] == [row["id"] for row in rows]


def test_several_files_become_one(tmp_path, capsys):
    one, two = written(tmp_path / "a.jsonl", [ALPACA]), written(tmp_path / "b.jsonl", [MESSAGES])
    run(two, one, tmp_path / "out.json")
    assert turns(tmp_path / "out.json") == turns(two) + turns(one)


def test_an_id_that_two_files_have_is_written_once(tmp_path, capsys):
    one = [{"id": id, "instruction": f"Say {id!r}.", "output": "Yes."} for id in (0, 1, "1")]
    run(written(tmp_path / "a.jsonl", one), written(tmp_path / "b.jsonl", [{"id": 1} | ALPACA]), tmp_path / "out.json")
    assert [row.id for row in read_conversations(tmp_path / "out.json")] == [0, 1, "1", None]
    assert "note: 1 rows written without their id, which an earlier row has\n" in capsys.readouterr().out


def test_preview_of_the_result_is_preview_of_the_original(tmp_path, golden_tokenizer, capsys):
    golden_tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write_rows(tmp_path / "in.json", ROWS)
    run(source, tmp_path / "out.json")
    shown = []
    for path in (source, tmp_path / "out.json"):
        capsys.readouterr()
        preview.main(
            ["--model_name_or_path", str(tmp_path / "tokenizer"), "--data_path", str(path), "--chat_template"]
            + ["lingowhale", "--json"]
        )
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].count("\n") == len(ROWS)


def test_bad_rows_leave_nothing_and_are_all_named(tmp_path):
    source = written(tmp_path / "in.jsonl", [ALPACA, BAD, MESSAGES, BAD | {"x": 1}])
    with pytest.raises(DataError, match=r"(?s)row 1.*row 3"):
        run(source, tmp_path / "out.json")
    assert [one.name for one in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_rows_can_be_dropped(tmp_path, capsys):
    bad = [{"conversations": [{"from": "human", "value": f"Nobody answers {number}"}]} for number in range(25)]
    source = written(tmp_path / "in.jsonl", [ALPACA, *bad, MESSAGES])
    run(source, tmp_path / "out.json", "--bad_rows", "drop")
    said = capsys.readouterr()
    assert turns(tmp_path / "out.json") == turns(written(tmp_path / "good.jsonl", [ALPACA, MESSAGES]))
    assert said.out.endswith("out.json: 2 rows, 25 dropped\n")
    assert said.err.startswith("25 dropped rows:\n") and " and 15 more: has no model turn" in said.err


@pytest.mark.parametrize("mode", ["error", "drop"])
def test_a_file_that_cannot_be_read_is_never_dropped(tmp_path, mode):
    (tmp_path / "in.json").write_text('[{"conversations": [{"from": "human"', encoding="utf-8")
    with pytest.raises(DataError, match="in.json"):
        run(tmp_path / "in.json", tmp_path / "out.json", "--bad_rows", mode)
    assert not (tmp_path / "out.json").exists()


def test_nothing_left_is_no_file(tmp_path):
    with pytest.raises(DataError, match="no conversation is left to write"):
        run(written(tmp_path / "in.jsonl", [BAD]), tmp_path / "out.json", "--bad_rows", "drop")
    assert not (tmp_path / "out.json").exists()


def test_repairs_by_name(tmp_path, capsys):
    run(written(tmp_path / "in.jsonl", [TRAILING]), tmp_path / "out.json", "--repairs", "drop_last_human")
    (row,) = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [turn["from"] for turn in row["conversations"]] == ["human", "model"]
    assert "note: 1 rows changed by drop_last_human\n" in capsys.readouterr().out


def test_an_existing_file_is_refused_and_stays(tmp_path):
    source = written(tmp_path / "in.jsonl", [ALPACA])
    before = source.read_bytes()
    with pytest.raises(ConfigError, match=r"in\.jsonl: exists and is not replaced"):
        run(source, source)
    with pytest.raises(ConfigError, match="is a folder"):
        run(source, tmp_path)
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists and is not replaced"):
        run(source, tmp_path / "dangling.json")
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["in.jsonl", "no/folder/out.json"], "there is no folder"),
        (["in.jsonl", "out.json.gz"], "expected a name that ends in .json or .jsonl, found .gz"),
        (["in.jsonl:0.5", "out.json"], "in.jsonl:0.5: a weight is for training"),
        (["in.jsonl"], "expected what to read and the file to write"),
        (["in.jsonl", "out.json", "--repairs", "mend"], "mend"),
        (["in.jsonl", "out.json", "--bad_row", "drop"], "unknown flag --bad_row: did you mean --bad_rows?"),
        (["in.jsonl", "out.json", "--bad_rows", "keep"], "--bad_rows keep: expected error or drop"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in.jsonl", [ALPACA])
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(*words)
    assert [one.name for one in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_disk_that_refuses(tmp_path, monkeypatch):
    source = written(tmp_path / "in.jsonl", [ALPACA])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"out\.json: cannot be written: No space left on device"):
        run(source, tmp_path / "out.json")
    assert [one.name for one in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_verb_and_its_exit_status(tmp_path):
    written(tmp_path / "in.jsonl", [ALPACA, BAD])
    statuses = []
    for flags in ([], ["--bad_rows", "drop"], ["--bad_rows", "drop"]):
        done = finetune_text("convert", tmp_path / "in.jsonl", tmp_path / "out.json", *flags)
        statuses.append(done.returncode)
        assert "Traceback" not in done.stderr
    assert statuses == [3, 0, 2]
    done = finetune_text("convert", "--help")
    assert (done.returncode, done.stderr) == (0, "") and "--repairs" in done.stdout
