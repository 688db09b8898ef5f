"""Stored evaluations as tables: what was not measured, and what has no value."""

import json

import pytest

from finetune.run_dir.eval_results import VERSION, load_results, read_sections, versioned, write_results
from finetune.utils.errors import ConfigError

SCORE = {"name": "arc", "metric": "acc", "shots": None, "rows": 1172}


def test_a_benchmark_stands_beside_the_published_scores(tmp_path):
    scores = [
        {**SCORE, "base": {"value": 0.25, "stderr": 0.0125}, "tuned": {"value": 0.5}},
        {**SCORE, "name": "mmlu", "shots": 5, "base": {"value": None}},
    ]
    published = {
        "source": "a paper",
        "names": ["arc", "mmlu", "gsm8k"],
        "rows": {"theirs": {"arc": 30.0, "mmlu": None}},
    }
    document = {"scores": scores, "published": published, "verdict": ["as good"], "notes": [1]}
    write_results(tmp_path, "benchmarks.json", versioned(document))

    (section,) = read_sections(tmp_path)

    own, theirs = section.tables
    assert own.rows == [
        ["arc", "acc", "", "1,172", "0.2500 ± 0.0125", "0.5000"],
        ["mmlu", "acc", "5", "1,172", "-", "-"],
    ]
    assert theirs.head == ["", "arc", "mmlu"]
    assert theirs.rows == [["this base", "25.0", "-"], ["this tuned", "50.0", "-"], ["theirs", "30.0", "-"]]
    assert (section.verdict, section.notes) == (["as good"], ["1"])


def test_forgotten_answers_are_shares_with_their_interval(tmp_path):
    group = {"name": "all", "questions": 1000, "base": 0.9, "tuned": 0.875, "difference": -0.025}
    group |= {"interval": [-0.05, 0.0], "lost": 30, "won": 5, "p": 0.0123}
    write_results(tmp_path, "forgetting.json", versioned({"groups": [group], "verdict": [], "notes": []}))

    (section,) = read_sections(tmp_path)

    assert section.tables[0].rows == [["all", "1,000", "90.0%", "87.5%", "-2.5", "-5.0 to +0.0", "30", "5", "0.012"]]


def test_rows_that_are_in_no_mean_are_named_and_the_rest_is_counted(tmp_path):
    lost = [{"source": "a.json", "row": row, "models": ["base"]} for row in range(7)]
    group = {"name": "all", "rows": 9, "tokens": 90, "tuned": {"loss": 1.5, "perplexity": None}}
    document = {"data": {"rows": 9, "tokens": 90, "not_measured": 2}, "non_finite": lost, "groups": [group]}
    document |= {"worst": [], "worsened": [], "verdict": "as it was"}
    write_results(tmp_path, "evaluation.json", versioned(document))

    (section,) = read_sections(tmp_path)

    assert section.notes[1] == "2 rows were dropped: see finetune preview"
    assert section.notes[-2:] == [
        "not finite and in no mean: a.json, row 4 (base)",
        "... and 2 more rows that are not finite",
    ]
    assert section.tables[0].rows == [["all", "9", "90", "1.5000", "over 1e300"]]


def test_results_of_another_version_are_made_anew(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"version": VERSION + 1}))
    with pytest.raises(ConfigError, match="written by another version: run finetune evaluate again"):
        load_results(tmp_path, "evaluation.json")
    assert load_results(tmp_path, "benchmarks.json") is None
