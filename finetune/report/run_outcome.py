"""How a run stands and what came of it, in words and numbers: its state, a failure, the plan against what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from finetune import diagnostics
from finetune.diagnostics.failure_text import what_happened, where_in_run, who_failed
from finetune.report.curves import GIB, seconds_of, tokens_of
from finetune.report.run_reader import RunRecord
from finetune.training import nonfinite
from finetune.utils.console import TrainingPlan

STATES = {
    "complete": "complete",
    "failed": "failed",
    "stopped": "stopped",
    "running": "running",
    "unknown": "no word of its end",
}
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class RunProblem:
    """A failure for the top of a page: a headline, the first lines of its message, the cause, the rest."""

    headline: str
    error: str
    cause: diagnostics.Cause | None
    traceback: str
    also: tuple[str, ...]
    facts: Rows


def run_problem(failure: diagnostics.Failure) -> RunProblem:
    """What failed, why probably, and what to do."""
    parts = ("The run failed:", who_failed(failure), what_happened(failure), where_in_run(failure))
    headline = " ".join(filter(None, parts))
    facts = [("When", failure.when), ("Exit status", str(failure.status)), ("Seen", "; ".join(failure.hints))]
    facts.append(("Newest checkpoint", failure.checkpoint))
    return RunProblem(
        headline=headline,
        error=failure.error,
        cause=diagnostics.likely_cause(failure),
        traceback=failure.traceback,
        also=failure.also,
        facts=[(label, text) for label, text in facts if text],
    )


def sentence(run: RunRecord) -> str:
    """How the run stands, in one sentence."""
    steps, planned = run.steps, _steps_planned(run)
    of = f" of {planned:,}" if planned else ""
    if run.state == "complete":
        return f"Complete after {steps:,} steps."
    if run.state == "running":
        return f"In progress: {steps:,}{of} steps are logged{_time_left(run)}."
    if run.state == "stopped":
        by = run.part("stopped").get("by") or "a request"
        return f"Stopped by {by} after {steps:,}{of} steps; --resume_from_checkpoint auto goes on."
    if run.state == "failed":
        return f"It ended early: {steps:,}{of} steps are logged."
    return f"{steps:,}{of} steps are logged; it was killed, or runs where this cannot be seen."


def _time_left(run: RunRecord) -> str:
    """By the last steps' pace."""
    recent = [line["step_seconds"] for line in run.lines[-20:] if line.get("step_seconds")]
    left = (_steps_planned(run) or 0) - run.steps
    return f", about {duration(left * _median(recent))} to go" if recent and left > 0 else ""


def tiles(run: RunRecord) -> Rows:
    """The few numbers that are looked for first; (what it is, the number)."""
    losses = [line["loss"] for line in run.lines if line.get("loss") is not None]
    evaluations = [one["eval_loss"] for one in run.evaluations if one.get("eval_loss") is not None]
    rates = [line["supervised_tokens_per_second"] for line in run.lines if line.get("supervised_tokens_per_second")]
    found = []
    if losses:
        found.append(("loss", f"{losses[0]:.4g} \N{RIGHTWARDS ARROW} {losses[-1]:.4g}"))
    if evaluations:
        found.append(("evaluation loss", f"{evaluations[0]:.4g} \N{RIGHTWARDS ARROW} {evaluations[-1]:.4g}"))
    planned = _steps_planned(run)
    found.append(("steps", f"{run.steps:,}" + (f" of {planned:,}" if planned and planned != run.steps else "")))
    if rates:
        found.append(("learned tokens a second", f"{_median(rates):,.0f}"))
    if seconds := sum(seconds_of(run)):
        found.append(("in steps", duration(seconds)))
    if memory := _peak(run):
        found.append(("peak memory of a rank", f"{memory / GIB:.2f} GiB"))
    return found


def tile_labels(runs: Sequence[RunRecord]) -> list[str]:
    """What the tiles of any of these runs are called, in order."""
    longest = max((tiles(run) for run in runs), key=len)
    return list(dict.fromkeys(label for found in (longest, *map(tiles, runs)) for label, _ in found))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _peak(run: RunRecord) -> float:
    return max((line.get("peak_memory_bytes") or 0.0 for line in run.lines), default=0.0)


def _steps_planned(run: RunRecord) -> int | None:
    steps = run.part("plan").get("steps")
    return steps if isinstance(steps, int) else None


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(3725)
    '1 h 2 min'
    """
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 60 / 24:.1f} days"


# ---- the plan against what happened


def stored_plan(run: RunRecord) -> TrainingPlan | None:
    """The plan as it was announced; None where run.json has none, or that of another version."""
    known = {one.name for one in fields(TrainingPlan)}
    values = run.part("plan")
    return TrainingPlan(**values) if set(values) == known else None


def against_the_plan(run: RunRecord) -> list[tuple[str, str, str]]:
    """(what, as planned, as it happened); an empty text where there is nothing to say."""
    plan, lines = stored_plan(run), run.lines
    found: list[tuple[str, str, str]] = []
    if plan is not None:
        tokens, learned = sum(tokens_of(run)), sum(tokens_of(run, "supervised_tokens_per_second"))
        logged = lines[-1]["step"] if lines else 0
        size = min(1.0, plan.per_device_batch * plan.accumulation * plan.data_ranks / (plan.groups or plan.examples))
        epochs = (lines[-1].get("epoch") or 0.0) if lines else 0.0
        found += [
            ("Steps", f"{plan.steps:,}", f"{run.steps:,}"),
            ("Epochs", f"{plan.epochs:.3g}", f"{epochs:.3g}" if logged else ""),
            ("Tokens a step", f"about {plan.tokens * size:,.0f}", f"{tokens / logged:,.0f}" if logged else ""),
            ("Tokens in all", f"about {plan.tokens * plan.epochs:,.0f}", f"about {tokens:,.0f}" if logged else ""),
            ("Learned share", f"{plan.supervised_share:.1%}", f"{learned / tokens:.1%}" if tokens else ""),
            ("Trained parameters", f"{plan.trainable:,} ({plan.trainable / plan.parameters:.2%} of the model's)", ""),
            ("Start-up", "", duration(sum(plan.start_up.values()))),
        ]  # fmt: skip
    if lines:
        found.append(("Time in steps", "", duration(sum(seconds_of(run)))))
    found += [("Wall clock", "", one) for one in _wall_clock(run)]
    if memory := _peak(run):
        found.append(("Peak memory of a rank", "", f"{memory / GIB:.2f} GiB"))
    found += _incidents(run)
    return found


def _wall_clock(run: RunRecord) -> list[str]:
    """Each start, from when to when."""
    found = []
    for start in run.listed("starts"):
        began, ended = (_moment(start.get(name)) for name in ("began", "ended"))
        if began is None:
            continue
        from_step = f", from step {start['from_step']:,}" if isinstance(start.get("from_step"), int) else ""
        text = f"began {began:%Y-%m-%d %H:%M:%S}{from_step if start.get('from_step') else ''}"
        if ended is not None:
            text += f", {start.get('how') or 'ended'} after {duration((ended - began).total_seconds())}"
        found.append(text)
    return found


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")
    except (TypeError, ValueError):
        return None


def _incidents(run: RunRecord) -> list[tuple[str, str, str]]:
    found = []
    lost = max((line.get("non_finite_steps") or 0 for line in run.lines), default=0)
    if run.lines:
        rows = f"; {run.lost_rows:,} rows are in {nonfinite.NONFINITE_ROWS_FILE}" if run.lost_rows else ""
        found.append(("Steps that were not finite", "0", f"{lost:.0f}{rows}"))
    for one in run.listed("resumed"):
        changes = f", {len(one['changes'])} changes allowed" if one.get("changes") else ""
        found.append(("Went on", "", f"from step {one.get('step')}{changes}: {one.get('from')}"))
    left_out = run.part("data").get("left_out")
    if left_out:
        found.append(("Rows left out", "0", f"{len(left_out):,}"))
    if run.unread:
        found.append(("Lines of metrics.jsonl", "", f"{run.unread:,} could not be read"))
    return found


def plan_lines(run: RunRecord) -> Rows:
    """The plan as the terminal showed it: (label, text)."""
    plan = stored_plan(run)
    return [] if plan is None else [tuple(line.strip().split(maxsplit=1)) for line in plan.lines()]
