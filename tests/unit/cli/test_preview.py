"""What preview shows in a terminal, as JSON and as a page, and which rows."""

import json
import re
from pathlib import Path

import pytest

from finetune.cli import preview
from finetune.dataset import prepare_workers
from finetune.utils.errors import ConfigError, DataError
from tests.helpers.logs import logged
from tests.helpers.rows import write_rows

TALK = [("human", "Hi"), ("model", "Yes"), ("human", "</s>[b]"), ("model", "好👩‍👧")]


@pytest.fixture(scope="module")
def tokenizer_folder(golden_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    golden_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def show(tokenizer_folder, tmp_path, capsys, monkeypatch):
    """Preview of rows in the LingoWhale format; what it prints on stdout."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(rows, *flags, path=tmp_path / "rows.json"):
        write_rows(path, rows)
        named = ["--model_name_or_path", str(tokenizer_folder), "--data_path", str(path)]
        preview.main([*named, "--chat_template", "lingowhale", *map(str, flags)])
        return capsys.readouterr().out.replace(str(path), path.name)

    return run


def numbered(count: int, text: str = "Ok"):
    return [[("human", f"Number {number}"), ("model", text)] for number in range(count)]


def shown_rows(out: str) -> list[int]:
    return [int(number) for number in re.findall(r"^rows\.json, row (\d+), id ", out, re.MULTILINE)]


def test_a_row_without_colour(show):
    lines = show([TALK]).splitlines()
    assert lines[0] == "context  ⟦supervised⟧  «control token»  ⟦«end of turn»⟧"
    assert lines[2:11] == [
        "rows.json, row 0, id 0: kept, 31 tokens, 19 supervised (61.3%)",
        "── human, context",
        "«<human>»Hi",
        "── model, supervised",
        "«<model>»⟦Yes«→</s>»⟧",
        "── human, context",
        "«<human>»</s>[b]",
        "── model, supervised",
        "«<model>»⟦好👩‍👧«</s>»⟧",
    ]
    assert lines[12] == "rows.json in lingowhale"
    assert lines[13].split() == "rows 1: 1 kept, 0 cut, 0 split, 0 dropped".split()


def test_a_row_in_colour(show, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = show([TALK])
    assert "\x1b[2mHi\x1b[0m" in out
    assert (
        "\x1b[1;32mYes\x1b[0m\x1b[7;32m→</s>\x1b[0m\n\x1b[36m── human, context\x1b[0m\n\x1b[7;35m<human>\x1b[0m" in out
    )
    assert "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦Yes«→</s>»⟧" in show([TALK])


def test_data_cannot_steer_the_terminal(show):
    out = show([[("human", "\x1b[31mred\x07 \u202egnp.exe"), ("model", "[/dim] ok\r")]])
    assert "«<human>»‹U+001B›[31mred‹U+0007› ‹U+202E›gnp.exe\n" in out and "«<model>»⟦[/dim] ok‹U+000D›«</s>»⟧" in out
    assert not set("\x1b\x07\u202e\r") & set(out)


def test_the_first_rows_without_a_choice(show):
    assert shown_rows(show(numbered(8))) == [0, 1, 2, 3, 4]


def test_rows_by_number_in_the_order_of_the_file(show):
    assert shown_rows(show(numbered(12), "--rows", 11, 3, 3, 0)) == [0, 3, 11]


@pytest.mark.parametrize("numbers", [(12,), (12, 3)])
def test_a_row_that_is_not_there(show, numbers):
    with pytest.raises(ConfigError, match=rf"--rows {numbers[0]}: there is no such row: .*rows.json has rows 0 to 11"):
        show(numbered(12), "--rows", *numbers)


def test_a_sample_is_the_same_for_the_same_seed(show):
    first, again, other = (shown_rows(show(numbered(40), "--sample", 6, *seed)) for seed in ((), (), ("--seed", 7)))
    assert first == again == sorted(set(first)) and len(first) == 6
    assert first != other and len(other) == 6
    assert shown_rows(show(numbered(4), "--sample", 6)) == [0, 1, 2, 3]


def test_rows_not_kept_whole_are_listed_and_counted(show):
    rows = [*numbered(2), [("human", "x" * 30), ("model", "y")], *numbered(25, "A long answer to this")]
    rows = [[*turns[:-1], ("model", f"{turns[-1][1]} {number}")] for number, turns in enumerate(rows)]
    out = show(rows, "--model_max_length", 20, "--rows", 2, 5)
    assert "row 2, id 2: dropped, 0 tokens, 0 supervised\n36 tokens: the context" in out
    assert "row 5, id 5: cut, 20 tokens, 10 supervised (50.0%)\n" in out
    assert "Rows not kept whole: 26\n" in out
    listed = re.findall(r"^  rows\.json, row (\d+): (\w+): \d+ tokens: ", out, re.MULTILINE)
    assert listed == [("2", "dropped"), *[(str(number), "cut") for number in range(3, 22)]]
    assert "  ... and 6 more\n" in out


def test_bad_rows_that_are_dropped_say_why_without_their_place(show):
    rows = numbered(12)
    rows[1] = rows[11]
    rows[2] = [("human", "Nobody answers")]
    lines = show(rows, "--bad_rows", "drop", "--rows", 2, 11).splitlines()
    assert lines[2:4] == [
        "rows.json, row 2, id 2: dropped, 0 tokens, 0 supervised",
        "has no model turn: there is nothing to learn from it",
    ]
    assert [
        line for line in lines if line.startswith("  rows.json, row 11: dropped: says the same as rows.json, row 1: ")
    ]


def test_data_that_training_would_refuse_is_shown_and_said(show):
    rows = [*numbered(3), [("human", "Nobody answers")]]
    for share, refused in (("0.2", 1), ("0.25", 0)):
        with logged() as shown:
            assert shown_rows(show(rows, "--bad_rows", "drop", "--max_dropped_rows", share)) == [0, 1, 2, 3]
        told = [line for line in shown if line.startswith("training would refuse this data: ")]
        assert len(told) == refused
        assert all("1 of 4 rows (25.0%) are bad, more than --max_dropped_rows 0.2 allows" in line for line in told)


def test_the_windows_of_a_split_row(show):
    turns = [("human", "One?"), ("model", "First."), ("human", "Two?"), ("model", "Second.")]
    out = show([turns], "--model_max_length", 16, "--too_long", "windows")
    assert "\nwindow 1 of 2\n── human, context\n«<human>»One?\n── model, supervised\n«<model>»⟦First.«</s>»⟧\n" in out
    assert "\nwindow 2 of 2\n── human, context\n«<human>»Two?\n── model, supervised\n«<model>»⟦Second.«</s>»⟧\n" in out
    assert "repeated" not in out


def test_json_is_one_line_a_row_and_nothing_else(show):
    rows = [TALK, [("human", "x" * 30), ("model", "y")]]
    first, second = map(json.loads, show(rows, "--json", "--model_max_length", 34).splitlines())
    (example,) = first.pop("examples")
    assert first == {"row": 0, "id": 0, "status": "kept", "reason": None}
    assert set(example) == {"input_ids", "labels"} and example["input_ids"][:2] == [3, 10 + ord("H")]
    assert example["labels"][:3] == [-100] * 3 and example["labels"][7] == 2 and example["input_ids"][7] == 3
    assert set(second) == {"row", "id", "status", "reason", "examples"}
    assert len(show(numbered(30), "--json").splitlines()) == 30


@pytest.mark.parametrize(("flags", "expected"), [((), [0, 1, 2, 3, 4]), (("--json",), list(range(9)))])
def test_rows_are_shown_before_the_last_is_prepared(show, tmp_path, capsys, monkeypatch, flags, expected):
    monkeypatch.setattr(prepare_workers, "BATCH_ROWS", 2)
    with pytest.raises(DataError, match="row 8: has no model turn"):
        show([*numbered(8), [("human", "Nobody answers")]], *flags)
    out = capsys.readouterr().out.replace(str(tmp_path / "rows.json"), "rows.json")
    assert (shown_rows(out) or [json.loads(line)["row"] for line in out.splitlines()]) == expected
    assert out.count("⟦supervised⟧") == (not flags) and "9 dropped" not in out


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_same_is_shown_from_the_cache(show, monkeypatch, flags):
    monkeypatch.setattr(prepare_workers, "BATCH_ROWS", 2)
    rows = [TALK, *numbered(3, "A long answer to this"), [("human", "x" * 30), ("model", "y")], *numbered(3)]
    first, again = (show(rows, "--model_max_length", 20, *flags) for _ in range(2))
    assert first == again and ("row 4" in first or '"row": 4' in first)


def test_the_first_rows_of_the_data_alone(show):
    assert len(show(numbered(30), "--json", "--limit", 12).splitlines()) == 12
    out = show(numbered(30), "--limit", 2)
    assert shown_rows(out) == [0, 1] and "2: 2 kept" in out
    assert len(show(numbered(30), "--json").splitlines()) == 30


def test_a_page_of_the_same_rows(show, tmp_path):
    page = tmp_path / "new" / "page.html"
    assert show(numbered(70), "--html", page) == f"{page}: 50 of 70 rows\n"
    assert page.read_text("utf-8").count("<article") == 50
    assert "50 of 70 rows, drawn with seed 42" in page.read_text("utf-8")
    rows = [TALK, [("human", "x" * 40), ("model", "<b>y</b>")]]
    show(rows, "--html", page, "--rows", 0, 1, "--model_max_length", 40)
    html = page.read_text("utf-8")
    assert '<mark class="supervised">Yes</mark><bdi class="control end unread"' in html
    assert "<b>" not in html and "Rows not kept whole: 1" in html
    assert '<div class="turn human"><div class="who"><div class="role">human</div>' in html


def test_statistics_in_the_terminal_and_on_the_page(show, tmp_path, monkeypatch):
    questions = {"exam": ["A question of five words"]}, ["mmlu: why"]
    monkeypatch.setattr("finetune.evaluation.benchmarks.read_benchmark_questions", lambda tasks: questions)
    shows = ("Tokens by role", "0 of 9 training rows are near-duplicates", "not looked for: mmlu: why")
    assert [words for words in shows if words not in show(numbered(9), "--stats")] == []
    show(numbered(9), "--stats", "--html", tmp_path / "page.html")
    assert [words for words in shows if words not in (tmp_path / "page.html").read_text("utf-8")] == []
    assert "Tokens by role" not in show(numbered(9))


def test_a_page_never_replaces_another_file(show, tmp_path):
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(ConfigError, match="is not replaced"):
        show(numbered(1), "--html", tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "1", "--sample", "2"], "--rows and --sample exclude each other"),
        (["--json", "--rows", "1"], "--json prints all rows: it excludes --rows"),
        (["--json", "--html", "x"], "--json prints all rows: it excludes --html"),
        (["--json", "--stats"], "--json prints all rows: it excludes --stats"),
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--sample", "0"], "--sample 0: expected at least 1"),
        (["--rows"], "--rows 0: expected at least 1"),
        (["--rows", "a"], "--rows a: expected a whole number"),
        (["--smple", "1"], "unknown flag --smple: did you mean --sample?"),
    ],
)
def test_flags_that_do_not_go_together(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        preview.parse_options(["--model_name_or_path", "m", "--data_path", "d", *words])


def test_a_recipe_is_previewed_with_the_flags_that_change_what_is_shown(tokenizer_folder, tmp_path, capsys):
    write_rows(tmp_path / "rows.json", [TALK])
    (tmp_path / "recipe.yaml").write_text(
        f"model_name_or_path: {tokenizer_folder}\ndata_path: {tmp_path}/rows.json\nchat_template: lingowhale\n"
        "learning_rate: 1e-4\nuse_lora: true\noutput_dir: o\nvalidation_share: 0.5\nmodel_max_length: 9\n"
    )
    preview.main([str(tmp_path / "recipe.yaml"), "--json", "model_max_length=2048"])
    assert json.loads(capsys.readouterr().out)["status"] == "kept"
    (tmp_path / "recipe.yaml").write_text("model_name_or_pat: m\n")
    with pytest.raises(ConfigError, match="did you mean --model_name_or_path"):
        preview.main([str(tmp_path / "recipe.yaml"), "--data_path", "d"])
