"""What the files of an output folder say of their run; what is missing or broken is left out."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune import diagnostics
from finetune.report.sample_answers import SampleAnswers, read_answers
from finetune.run_dir import output_dir_lock, run_json
from finetune.run_dir.data_samples import RowSample, read_samples, without_place
from finetune.run_dir.eval_results import FILES, ResultSection, read_sections
from finetune.training import nonfinite
from finetune.utils.errors import ConfigError
from finetune.utils.user_files import MALFORMED, UNREADABLE

State = Literal["complete", "failed", "stopped", "running", "unknown"]
MAX_LEDGER_ROWS = 100
MAX_NUMBER = 1e50  # sums of products of three are finite
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
    """One run as its folder shows it now."""

    folder: Path
    name: str  # of the run among others
    facts: dict[str, Any]  # run.json
    lines: list[dict[str, Any]]  # of metrics.jsonl with a `loss`, by rising step; a value is finite or None
    evaluations: list[dict[str, Any]]  # those with an `eval_loss`
    unread: int  # lines that are no JSON object with a step
    failure: diagnostics.Failure | None
    state: State
    ledger: LedgerSummary
    cards: list[RowSample]
    answers: SampleAnswers | None
    lost_rows: int
    evaluated: list[ResultSection] = field(default_factory=list)  # what `finetune evaluate` has stored

    @property
    def state_text(self) -> str:
        return "end unknown" if self.state == "unknown" else self.state

    def part(self, *names: str) -> dict[str, Any]:
        """An object inside run.json; empty where there is none."""
        value: Any = self.facts
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    def listed(self, name: str) -> list[Any]:
        """A list of objects in run.json."""
        value = self.facts.get(name)
        return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []

    @property
    def steps(self) -> int:
        """Optimizer steps made, as far as the files say so."""
        made = self.part("result").get("steps") if self.state == "complete" else None
        logged = [self.lines[-1]["step"]] if self.lines else [0]
        if self.state == "stopped":
            logged.append(self.part("stopped").get("step") or 0)
        return made if isinstance(made, int) else max(logged)


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read everything that a report needs."""
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
        evaluated=_evaluated(folder),
    )


def _evaluated(folder: Path) -> list[ResultSection]:
    """Return the stored evaluations; of a file that cannot be read, the reason."""
    sections: list[ResultSection] = []
    for name in FILES:
        try:
            sections += read_sections(folder, [name])
        except ConfigError as error:
            sections.append(ResultSection("Evaluation", [], [], notes=[str(error)]))
        except MALFORMED as error:
            note = f"{folder / name}: is not as this version writes it: {error!r}"
            sections.append(ResultSection("Evaluation", [], [], notes=[note]))
    return sections


def has_ended(folder: Path) -> bool:
    """Whether this start of the run is over: complete, failed or stopped."""
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
    """Return lines with a loss, lines with an evaluation loss, and the number of lines with neither."""
    lines: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    unread = 0
    for text in _lines_of(path):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        step = values.get("step") if isinstance(values, dict) else None
        if not isinstance(step, int) or _number(step) is None:
            unread += 1
            continue
        line: dict[str, Any] = {"step": step}
        line |= {name: _number(value) for name, value in values.items() if name != "step"}
        for name in GROUPS:
            group = values.get(name)
            named = group.items() if isinstance(group, dict) else ()
            line[name] = {key: number for key, value in named if (number := _number(value)) is not None}
        if "eval_loss" in values:
            _append(evaluations, line)
        if "loss" in values:
            _append(lines, line)
        elif "eval_loss" not in values:
            unread += 1
    return lines, evaluations, unread


def _append(lines: list[dict[str, Any]], line: dict[str, Any]) -> None:
    """Append a line; those of its step and later ones are replaced, for the run was resumed before them."""
    while lines and lines[-1]["step"] >= line["step"]:
        lines.pop()
    lines.append(line)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER
    return value if is_number else None


def _lines_of(path: Path) -> list[str]:
    """Return complete lines; the last one may still be in writing."""
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
        except UNREADABLE:
            continue
        counts[status] += 1
        if len(first) < MAX_LEDGER_ROWS:
            first.append((source, row, status, without_place(str(entry.get("reason") or ""), source, row)))
    return LedgerSummary(tuple(first), dict(counts))
