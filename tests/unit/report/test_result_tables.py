"""Tables of results in terminals of any width."""

import re

import pytest

from finetune.report.preview_terminal import print_sections
from finetune.run_dir.eval_results import ResultSection, ResultTable

HEAD = ["", "rows", "tokens", "base loss", "tuned loss", "difference", "95 %", "rows worse", "tuned perplexity"]
ROWS = [
    ["all rows", "130", "2,790", "10.7893", "10.3337", "-0.4555", "-0.479 to -0.431", "4", "30,752.95"],
    ["答案", "29", "509", "10.7792", "10.3394", "-0.4398", "-0.486 to -0.389", "1", "30,926.54"],
]


@pytest.mark.parametrize(("columns", "tables"), [(200, 1), (80, 2), (40, 3)])
def test_a_table_is_never_wider_than_the_terminal_and_keeps_every_number(monkeypatch, capsys, columns, tables):
    for name, value in {"COLUMNS": str(columns), "FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    print_sections(ResultSection("Held out", [], [ResultTable("Loss", HEAD, ROWS)]))
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= columns
    assert text.count("all rows") == text.count("答案") == tables
    assert set(ROWS[0][1:-2] + ROWS[1][1:-2]) <= set(re.split(r"  +|\n", text))


def test_a_table_without_rows_shows_its_head(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_sections(ResultSection("Held out", [], [ResultTable("Loss", HEAD, [])]))
    assert "perplexity" in capsys.readouterr().out
