"""What an evaluation leaves beside the result, and the same as plain tables, for a terminal or a page.

    evaluation.json    held-out conversations: losses by row, answer and source
    benchmarks.json    tasks of lm-evaluation-harness
    forgetting.json    what the base could do and the tuned model cannot

Nothing here needs torch. `sections` is all that a report has to know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError, StorageError

HELD_OUT_FILE, BENCHMARKS_FILE, FORGETTING_FILE = "evaluation.json", "benchmarks.json", "forgetting.json"
FILES = (HELD_OUT_FILE, BENCHMARKS_FILE, FORGETTING_FILE)
VERSION = 1


@dataclass(frozen=True)
class ResultTable:
    """Cells as text; the first column names the row, the others are numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class TableRow:
    """One conversation as text: `segments` have the keys of `chat_templates.text_segments.Segment`."""

    title: str
    segments: list[dict[str, Any]]


@dataclass(frozen=True)
class ResultSection:
    """One evaluation, ready to be shown.

    Attributes:
        verdict: sentences that stand above everything.
    """

    title: str
    verdict: list[str]
    tables: list[ResultTable]
    rows: list[tuple[str, list[TableRow]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_writable(folder: Path, name: str) -> None:
    """Found out before hours of work.

    Raises:
        StorageError: the file cannot be written.
    """
    probe = folder / f".{name}.probe-{os.getpid()}"  # each rank its own
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{folder / name}: cannot be written: {error.strerror}") from None


def versioned(document: dict[str, Any]) -> dict[str, Any]:
    """A document that later versions can tell from theirs."""
    return {"version": VERSION, **document}


def write_results(folder: Path, name: str, document: dict[str, Any]) -> None:
    """Write a document beside the result, whole or not at all.

    Raises:
        StorageError: the disk refused.
    """
    write_text_atomically(folder / name, json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def load_results(folder: Path, name: str) -> dict[str, Any] | None:
    """A stored document, or None where there is none.

    Raises:
        ConfigError: it is not one of ours, or another version's.
    """
    path = folder / name
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ConfigError(f"{path}: was not written by this version: evaluate again")
    return document


def read_sections(folder: Path, names: Sequence[str] = FILES) -> list[ResultSection]:
    """All that was found out about the result in `folder`; empty where it was not evaluated.

    Raises:
        ConfigError: a stored document cannot be read.
    """
    found = ((name, load_results(folder, name)) for name in names)
    return [SECTIONS[name](document) for name, document in found if document is not None]


# ---- held-out conversations


def held_out_section(document: dict[str, Any]) -> ResultSection:
    """`evaluation.json` as tables."""
    data, lost = document["data"], document["non_finite"]
    notes = [f"{data['rows']:,} rows, {data['tokens']:,} learned tokens; losses are means over tokens, in nats"]
    if data["not_measured"]:
        notes.append(f"{data['not_measured']:,} rows were dropped before: see finetune preview")
    for one in lost[:5]:
        notes.append(f"not finite, and in no mean: {one['source']}, row {one['row']} ({', '.join(one['models'])})")
    if len(lost) > 5:
        notes.append(f"... and {len(lost) - 5:,} more rows that are not finite")
    rows = [
        (title, [_row(one) for one in document[key]])
        for title, key in (
            ("Rows with the largest loss", "worst"),
            ("Rows on which the tuned model is worse than the base", "worsened"),
        )
        if document[key]
    ]
    table = ResultTable("Loss per token", *_held_out_table(document["groups"]))
    return ResultSection("Held-out conversations", [document["verdict"]], [table], rows, notes)


def _held_out_table(groups: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    has_base = "base" in groups[0]
    models = ["base", "tuned"] if has_base else ["tuned"]
    head = ["", "rows", "tokens", *(f"{model} loss" for model in models)]
    head += ["difference", "95 %", "rows worse"] if has_base else []
    head += [f"{model} perplexity" for model in models]
    rows = []
    for one in groups:
        cells = [one["name"], f"{one['rows']:,}", f"{one['tokens']:,}"]
        cells += [f"{one[model]['loss']:.4f}" for model in models]
        if has_base:
            apart = one["difference"]
            cells += [f"{apart['loss']:+.4f}", _between(apart["interval"], "+.3f"), f"{apart['rows_worse']:,}"]
        cells += [_perplexity(one[model]["perplexity"]) for model in models]
        rows.append(cells)
    return head, rows


def _perplexity(value: float | None) -> str:
    return "over 1e300" if value is None else f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _between(interval: list[float] | None, form: str) -> str:
    return "-" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _row(one: dict[str, Any]) -> TableRow:
    identity = "" if one["id"] is None else f", id {one['id']}"
    losses = ", ".join(f"{model} {one[model]:.4f}" for model in ("base", "tuned") if one.get(model) is not None)
    return TableRow(
        f"{one['source']}, row {one['row']}{identity}: {one['tokens']:,} tokens, loss {losses}", one["segments"]
    )


# ---- benchmarks


def benchmarks_section(document: dict[str, Any]) -> ResultSection:
    """`benchmarks.json` as tables."""
    models = [model for model in ("base", "tuned") if any(model in one for one in document["scores"])]
    head = ["task", "metric", "shots", "rows", *models]
    rows = []
    for one in document["scores"]:
        cells = [one["name"], one["metric"], "" if one["shots"] is None else str(one["shots"]), f"{one['rows']:,}"]
        rows.append(cells + [_score(one.get(model)) for model in models])
    tables = [ResultTable("Benchmarks", head, rows)]
    if document.get("published"):
        names = [one["name"] for one in document["scores"] if one["name"] in document["published"]["names"]]
        ours = {
            model: {one["name"]: 100 * one[model]["value"] for one in document["scores"] if model in one}
            for model in models
        }
        lines = [[f"this {model}", *(_cell(values.get(name)) for name in names)] for model, values in ours.items()]
        for label, values in document["published"]["rows"].items():
            lines.append([label, *(_cell(values.get(name)) for name in names)])
        tables.append(
            ResultTable(f"Beside the published rows ({document['published']['source']})", ["", *names], lines)
        )
    return ResultSection("Benchmarks", document["verdict"], tables, [], document["notes"])


def _score(found: dict[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    error = found.get("stderr")
    return f"{found['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


# ---- forgetting


def forgetting_section(document: dict[str, Any]) -> ResultSection:
    """`forgetting.json` as tables."""
    head = ["", "questions", "base", "tuned", "difference", "95 %", "lost", "won", "p"]
    rows = []
    for one in document["groups"]:
        rows.append(
            [
                one["name"],
                f"{one['questions']:,}",
                f"{one['base']:.1%}",
                f"{one['tuned']:.1%}",
                f"{100 * one['difference']:+.1f}",
                _between([100 * end for end in one["interval"]], "+.1f"),
                f"{one['lost']:,}",
                f"{one['won']:,}",
                f"{one['p']:.2g}",
            ]
        )
    table = ResultTable("What the base could do", head, rows)
    return ResultSection("Forgetting", document["verdict"], [table], [], document["notes"])


SECTIONS: dict[str, Callable[[dict[str, Any]], ResultSection]] = {
    HELD_OUT_FILE: held_out_section,
    BENCHMARKS_FILE: benchmarks_section,
    FORGETTING_FILE: forgetting_section,
}
