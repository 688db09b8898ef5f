"""Files that evaluations write to the output_dir, and their content as plain tables for a terminal or a page.

    evaluation.json    held-out conversations: losses by row, answer and source
    benchmarks.json    tasks of lm-evaluation-harness
    forgetting.json    questions that the base answers and the tuned model does not

Reports use `read_sections` only.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.chat_templates.text_segments import Segment
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError, storage_errors
from finetune.utils.user_files import from_json, read_json_object

HELD_OUT_FILE, BENCHMARKS_FILE, FORGETTING_FILE = "evaluation.json", "benchmarks.json", "forgetting.json"
FILES = (HELD_OUT_FILE, BENCHMARKS_FILE, FORGETTING_FILE)
VERSION = 1


@dataclass(frozen=True)
class ResultTable:
    """A table with cells as text; the first column names the row, the others are numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class TableRow:
    """A conversation as text."""

    title: str
    segments: list[Segment]


@dataclass(frozen=True)
class ResultSection:
    """The results of one evaluation."""

    title: str
    verdict: list[str]  # sentences with the result
    tables: list[ResultTable]
    rows: list[tuple[str, list[TableRow]]] = field(default_factory=list)  # titles with conversations
    notes: list[str] = field(default_factory=list)


def check_writable(folder: Path, name: str) -> None:
    """Raise `StorageError` if the file cannot be written, before hours of work."""
    probe = folder / f".{name}.probe-{os.getpid()}"  # one per rank
    with storage_errors(folder / name, f"{folder / name}: cannot be written"):
        probe.touch()
        probe.unlink()


def versioned(document: dict[str, Any]) -> dict[str, Any]:
    """Add the version of the format."""
    return {"version": VERSION, **document}


def write_results(folder: Path, name: str, document: dict[str, Any]) -> None:
    """Write a document to the output_dir, atomically."""
    write_text_atomically(folder / name, json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def load_results(folder: Path, name: str) -> dict[str, Any] | None:
    """Read a stored document, or return None if there is none."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    document = read_json_object(path)
    if document.get("version") != VERSION:
        raise ConfigError(f"{path}: written by another version: run finetune evaluate again")
    return document


def read_sections(folder: Path, names: Sequence[str] = FILES) -> list[ResultSection]:
    """Read all evaluations of the result in `folder`."""
    documents = ((name, load_results(folder, name)) for name in names)
    return [SECTIONS[name](document) for name, document in documents if document is not None]


# ---- held-out conversations


def held_out_section(document: dict[str, Any]) -> ResultSection:
    """Return `evaluation.json` as tables."""
    data, non_finite = document["data"], document["non_finite"]
    notes = [f"{data['rows']:,} rows, {data['tokens']:,} supervised tokens; losses are means over tokens, in nats"]
    if data["not_measured"]:
        notes.append(f"{data['not_measured']:,} rows were dropped: see finetune preview")
    for row in non_finite[:5]:
        notes.append(f"not finite and in no mean: {row['source']}, row {row['row']} ({', '.join(row['models'])})")
    if len(non_finite) > 5:
        notes.append(f"... and {len(non_finite) - 5:,} more rows that are not finite")
    rows = [
        (title, [_row(row) for row in document[key]])
        for title, key in (
            ("Rows with the largest loss", "worst"),
            ("Rows on which the tuned model is worse than the base", "worsened"),
        )
        if document[key]
    ]
    tables = [ResultTable("Loss per token", *_held_out_table(document["groups"]))]
    if calls := document.get("tool_calls"):
        tables.append(_tool_call_table(calls))
        notes.append(f"tool calls: the answers of {calls['rows']:,} rows with tools, written greedily")
        if calls["left_out"]:
            notes.append(f"tool calls: {calls['left_out']:,} turns are too long or have no prompt of serving")
    return ResultSection("Held-out conversations", [document["verdict"]], tables, rows, notes)


def _tool_call_table(calls: dict[str, Any]) -> ResultTable:
    counts = [calls["counts"][model] for model in ("base", "tuned") if model in calls["counts"]]
    head = ["", "turns", *(model for model in ("base", "tuned") if model in calls["counts"])]
    rows = [
        [label, f"{calls[of]:,}", *(f"{count[key] / calls[of]:.1%}" for count in counts)]
        for label, key, of in (
            ("valid call", "valid", "with_call"),
            ("right tool", "right_name", "with_call"),
            ("right arguments", "right_arguments", "with_call"),
            ("call where the data has none", "false_calls", "without_call"),
        )
        if calls[of]
    ]
    return ResultTable("Tool calls", head, rows)


def _held_out_table(groups: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    has_base = "base" in groups[0]
    models = ["base", "tuned"] if has_base else ["tuned"]
    head = ["", "rows", "tokens", *(f"{model} loss" for model in models)]
    head += ["difference", "95 %", "rows worse"] if has_base else []
    head += [f"{model} perplexity" for model in models]
    rows = []
    for group in groups:
        cells = [group["name"], f"{group['rows']:,}", f"{group['tokens']:,}"]
        cells += [f"{group[model]['loss']:.4f}" for model in models]
        if has_base:
            difference = group["difference"]
            interval = _interval(difference["interval"], "+.3f")
            cells += [f"{difference['loss']:+.4f}", interval, f"{difference['rows_worse']:,}"]
        cells += [_perplexity(group[model]["perplexity"]) for model in models]
        rows.append(cells)
    return head, rows


def _perplexity(value: float | None) -> str:
    return "over 1e300" if value is None else f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _interval(interval: list[float] | None, number_format: str) -> str:
    return "-" if interval is None else f"{interval[0]:{number_format}} to {interval[1]:{number_format}}"


def _row(row: dict[str, Any]) -> TableRow:
    identity = "" if row["id"] is None else f", id {row['id']}"
    losses = ", ".join(f"{model} {row[model]:.4f}" for model in ("base", "tuned") if row.get(model) is not None)
    title = f"{row['source']}, row {row['row']}{identity}: {row['tokens']:,} tokens, loss {losses}"
    return TableRow(title, [from_json(Segment, segment, "a segment:") for segment in row["segments"]])


def _texts(values: list[Any]) -> list[str]:
    return [str(value) for value in values]


# ---- benchmarks


def benchmarks_section(document: dict[str, Any]) -> ResultSection:
    """Return `benchmarks.json` as tables."""
    scores, published = document["scores"], document.get("published")
    models = [model for model in ("base", "tuned") if any(model in score for score in scores)]
    head = ["task", "metric", "shots", "rows", *models]
    rows = []
    for score in scores:
        shots = "" if score["shots"] is None else str(score["shots"])
        cells = [score["name"], score["metric"], shots, f"{score['rows']:,}"]
        rows.append(cells + [_score(score.get(model)) for model in models])
    tables = [ResultTable("Benchmarks", head, rows)]
    if published:
        names = [score["name"] for score in scores if score["name"] in published["names"]]
        percents = {
            f"this {model}": {
                score["name"]: 100 * score[model]["value"]
                for score in scores
                if model in score and score[model]["value"] is not None
            }
            for model in models
        }
        rows = [
            [label, *("-" if values.get(name) is None else f"{values[name]:.1f}" for name in names)]
            for label, values in {**percents, **published["rows"]}.items()
        ]
        tables.append(ResultTable(f"Published scores ({published['source']})", ["", *names], rows))
    return ResultSection("Benchmarks", _texts(document["verdict"]), tables, [], _texts(document["notes"]))


def _score(score: dict[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    error = score.get("stderr")
    return f"{score['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


# ---- forgetting


def forgetting_section(document: dict[str, Any]) -> ResultSection:
    """Return `forgetting.json` as tables."""
    head = ["", "questions", "base", "tuned", "difference", "95 %", "lost", "won", "p"]
    rows = [
        [
            group["name"],
            f"{group['questions']:,}",
            f"{group['base']:.1%}",
            f"{group['tuned']:.1%}",
            f"{100 * group['difference']:+.1f}",
            _interval([100 * end for end in group["interval"]], "+.1f"),
            f"{group['lost']:,}",
            f"{group['won']:,}",
            f"{group['p']:.2g}",
        ]
        for group in document["groups"]
    ]
    table = ResultTable("What the base could do", head, rows)
    return ResultSection("Forgetting", _texts(document["verdict"]), [table], [], _texts(document["notes"]))


SECTIONS: dict[str, Callable[[dict[str, Any]], ResultSection]] = {
    HELD_OUT_FILE: held_out_section,
    BENCHMARKS_FILE: benchmarks_section,
    FORGETTING_FILE: forgetting_section,
}
