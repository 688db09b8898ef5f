"""The statistics of a data set, counted again from its examples."""

from dataclasses import replace

import pytest

from finetune.chat_templates import CHATML, JinjaFormat, Renderer
from finetune.dataset.data_sources import find_sources
from finetune.dataset.prepare import prepare_dataset
from finetune.report.data_statistics import statistics_section
from tests.helpers.rows import ROWS, write_rows

LONG = "The quick brown fox jumps over the lazy dog while seven wizards watch it from a distant green hill"
TRAINING = [*ROWS, [("human", LONG), ("model", LONG + " again")], [("human", LONG + "!"), ("model", LONG + " again.")]]
HELD_OUT = [[("human", LONG + "?"), ("model", LONG + ": again")], [("human", "Привет, Nori"), ("model", "Привет")]]


@pytest.fixture
def section(smol_tokenizer, tmp_path):
    chat_format = JinjaFormat(smol_tokenizer, CHATML, "chatml")

    def prepared(name, rows):
        sources = find_sources([str(write_rows(tmp_path / name, rows))])
        return prepare_dataset(sources, Renderer(chat_format, 200), cache_dir=tmp_path / "cache")

    training, held_out = prepared("a.json", TRAINING), prepared("b.json", HELD_OUT)
    questions = {
        "exam": [LONG, "Short?"],
        "another": ["nobody asked this question here in any of the rows that are in the data"],
    }
    found = statistics_section(replace(training, evaluation=held_out), chat_format.plain, questions, ["x: why"])
    tables = {
        table.title: [[cell.replace(f"{tmp_path}/", "") for cell in row] for row in table.rows]
        for table in found.tables
    }
    return training.summary, tables, found


def test_lengths_and_scripts_by_source(section):
    summary, tables, _ = section
    own, held_out = tables["Lengths in tokens, and scripts"]
    half, most, nearly_all = summary.length_percentiles
    assert own[:-1] == ["a.json", "8", *map(str, (summary.tokens, half, most, nearly_all, summary.longest))]
    assert own[-1].startswith("Latin 9") and "CJK" in own[-1]
    assert held_out[0] == "b.json (held out)" and "Cyrillic" in held_out[-1]


def test_tokens_by_role_add_up_to_those_of_the_data(section):
    summary, tables, _ = section
    rows = {
        name: (int(tokens), int(supervised), share) for name, tokens, supervised, share, _ in tables["Tokens by role"]
    }
    own = {name: numbers for name, numbers in rows.items() if name.startswith("a.json: ")}
    assert {name.partition(": ")[2] for name in own} == {"system", "human", "model", "(between turns)"}
    assert sum(tokens for tokens, *_ in own.values()) == summary.tokens
    assert own["a.json: model"][1:] == (summary.supervised_tokens, "100.0%")
    assert own["a.json: human"][1:] == (0, "0.0%")
    assert tables["Tokens by role"][-1][-1] == ""  # held-out tokens are no share of those that are trained on


def test_rows_that_dominate(section):
    summary, tables, found = section
    first, *_ = rows = tables["Rows with the most supervised tokens"]
    assert len(rows) == 5 and first[0] in ("a.json, row 6", "a.json, row 7")
    assert first[2] == f"{int(first[1]) / summary.supervised_tokens:.2%}"
    assert (
        found.verdict[0] == f"1 of 8 rows hold {int(first[1]) / summary.supervised_tokens:.1%} of the supervised tokens"
    )


def test_near_duplicates_within_and_between(section):
    _, tables, found = section
    assert [row[:2] for row in tables["Near-duplicates, the first"]] == [
        ["a.json, row 7", "a.json, row 6"], ["b.json, row 0", "a.json, row 6"],
    ]  # fmt: skip
    assert found.verdict[1:4] == [
        "1 of 8 training rows are near-duplicates of an earlier training row",
        "1 of 2 held-out rows are near-duplicates of a training row",
        "0 of 2 held-out rows are near-duplicates of an earlier held-out row",
    ]


def test_benchmark_questions_in_the_data(section):
    _, tables, found = section
    assert tables["Benchmark questions in the training data"] == [
        ["exam", "2", "1", "1", "a.json, row 6"], ["another", "1", "1", "0", ""],
    ]  # fmt: skip
    assert found.verdict[-1].startswith("1 of 2 benchmark questions")
    assert found.notes[-1] == "not looked for: x: why"
