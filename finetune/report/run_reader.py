"""What an output_dir says of its run, read from its files alone; whatever is missing or broken is left out."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune import diagnostics
from finetune.report.sample_answers import SampleAnswers, read_answers
from finetune.run_dir import output_dir_lock, run_json
from finetune.run_dir.data_samples import RowSample, read_samples
from finetune.run_dir.eval_results import FILES, ResultSection, read_sections
from finetune.training import nonfinite
from finetune.utils.errors import ConfigError

State = Literal["complete", "failed", "stopped", "running", "unknown"]
LISTED_ROWS = 100
GROUPS = ("loss_by_source", "loss_by_turn")


@dataclass(frozen=True)
class LedgerSummary:
    """Rows that were not kept as they stood: the first of them, and how many there are by status."""

    first: tuple[tuple[str, int, str, str], ...]
    counts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder shows it at this moment.

    Attributes:
        name: how the run is called beside others.
        facts: run.json.
        lines: of metrics.jsonl, those with a `loss`, by rising step; a value is a finite number or None.
        evaluations: those with an `eval_loss`.
        unread: lines that are no JSON object with a step.
        found_out: what `finetune evaluate` has stored.
    """

    folder: Path
    name: str
    facts: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    unread: int
    failure: diagnostics.Failure | None
    state: State
    ledger: LedgerSummary
    cards: list[RowSample]
    answers: SampleAnswers | None
    lost_rows: int
    found_out: list[ResultSection] = field(default_factory=list)

    def part(self, *names: str) -> dict[str, Any]:
        """An object inside run.json; empty where there is none."""
        value: Any = self.facts
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    def listed(self, name: str) -> list[Any]:
        """A list of objects in run.json."""
        value = self.facts.get(name)
        return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []

    @property
    def steps(self) -> int:
        """Optimizer steps that were made, as far as anything says so."""
        made = self.part("result").get("steps") if self.state == "complete" else None
        logged = [self.lines[-1]["step"]] if self.lines else [0]
        if self.state == "stopped":
            logged.append(self.part("stopped").get("step") or 0)
        return made if isinstance(made, int) else max(logged)


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read all that a report needs.

    Raises:
        ConfigError: the folder holds no run.json, or it is not a JSON object.
    """
    facts = run_json.load_run_json(folder)
    lines, evaluations, unread = read_metrics(folder / run_json.METRICS_FILE)
    failure = diagnostics.read_failure(folder / diagnostics.FAILURE_FILE)
    return RunRecord(
        folder=folder,
        name=name or folder.absolute().name,
        facts=facts,
        lines=lines,
        evaluations=evaluations,
        unread=unread,
        failure=failure,
        state=_state(folder, facts, failure),
        ledger=_read_ledger(folder / run_json.LEDGER_FILE),
        cards=read_samples(folder),
        answers=read_answers(folder, facts),
        lost_rows=len(_lines_of(folder / nonfinite.NONFINITE_ROWS_FILE)),
        found_out=_found_out(folder),
    )


def _found_out(folder: Path) -> list[ResultSection]:
    """What was evaluated; of a file that cannot be read, the reason."""
    found: list[ResultSection] = []
    for name in FILES:
        try:
            found += read_sections(folder, [name])
        except ConfigError as error:
            found.append(ResultSection("Evaluation", [], [], notes=[str(error)]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            note = f"{folder / name}: is not as this version writes it: {error!r}"
            found.append(ResultSection("Evaluation", [], [], notes=[note]))
    return found


def has_ended(folder: Path) -> bool:
    """Whether nothing more will come of this start of the run: complete, failed or stopped."""
    if (folder / run_json.COMPLETE_FILE).is_file() or (folder / diagnostics.FAILURE_FILE).is_file():
        return True
    return _was_stopped(run_json.starts(folder))


def _state(folder: Path, facts: dict[str, Any], failure: diagnostics.Failure | None) -> State:
    if failure is not None:
        return "failed"
    if facts.get("completed"):
        return "complete"
    if _was_stopped(facts.get("starts")):
        return "stopped"
    return "running" if output_dir_lock.is_locked(folder) else "unknown"


def _was_stopped(starts: Any) -> bool:
    last = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
    return str(last.get("how")).startswith("stopped")


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """(lines with a loss, lines with an evaluation's loss, how many lines are neither)."""
    lines: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    unread = 0
    for text in _lines_of(path):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        step = values.get("step") if isinstance(values, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            unread += 1
            continue
        found = {"step": step, **{name: _number(value) for name, value in values.items() if name != "step"}}
        for name in GROUPS:
            group = values.get(name)
            named = group.items() if isinstance(group, dict) else ()
            found[name] = {key: number for key, value in named if (number := _number(value)) is not None}
        if "eval_loss" in values:
            _append(evaluations, found)
        if "loss" in values:
            _append(lines, found)
        elif "eval_loss" not in values:
            unread += 1
    return lines, evaluations, unread


def _append(lines: list[dict[str, Any]], line: dict[str, Any]) -> None:
    """Steps only rise: a run that went on from an earlier step has made the later ones anew."""
    while lines and lines[-1]["step"] >= line["step"]:
        lines.pop()
    lines.append(line)


def _number(value: Any) -> float | None:
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_one else None


def _lines_of(path: Path) -> list[str]:
    """Lines that are finished: the last one may still be written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.split("\n")[:-1] if line.strip()]


def _read_ledger(path: Path) -> LedgerSummary:
    first: list[tuple[str, int, str, str]] = []
    counts: Counter[str] = Counter()
    for text in _lines_of(path):
        try:
            entry = json.loads(text)
            source, row, status = str(entry["source"]), int(entry["row"]), str(entry["status"])
        except (ValueError, KeyError, TypeError):
            continue
        counts[status] += 1
        if len(first) < LISTED_ROWS:
            place = f"{source}, row {row}"
            reason = str(entry.get("reason") or "").replace(f"{place}: ", "").replace(f"{place}, ", "")
            first.append((source, row, status, reason))
    return LedgerSummary(tuple(first), dict(counts))
