"""The state of a run and its outcome, in words and numbers: a failure, the plan against what happened."""

from collections.abc import Sequence
from datetime import datetime
from statistics import median
from typing import Any

from finetune.diagnostics import Failure
from finetune.diagnostics.failure_page import what_happened, where_in_run, who_failed
from finetune.report.curves import GIB, seconds_of, tokens_of
from finetune.report.run_reader import RunRecord
from finetune.run_dir.training_plan import TrainingPlan
from finetune.training import nonfinite
from finetune.utils.user_files import from_json

RECENT_LINES = 20
Rows = list[tuple[str, str]]


def headline(failure: Failure) -> str:
    """Return who failed, how and where."""
    parts = ("The run failed:", who_failed(failure), what_happened(failure), where_in_run(failure))
    return " ".join(filter(None, parts))


def failure_facts(failure: Failure) -> Rows:
    """Return what else is known of a failure, as (label, text)."""
    facts = [
        ("When", failure.when),
        ("Exit status", str(failure.status)),
        ("Observed", "; ".join(failure.hints)),
        ("Newest checkpoint", failure.checkpoint),
    ]
    return [(label, text) for label, text in facts if text]


def sentence(run: RunRecord) -> str:
    """Return the state of the run in one sentence."""
    planned = _steps_planned(run)
    steps = f"{run.steps:,}" + (f" of {planned:,}" if planned else "")
    if run.state == "complete":
        return f"Complete after {run.steps:,} steps."
    if run.state == "running":
        return f"In progress: {steps} steps are logged{_time_left(run)}."
    if run.state == "stopped":
        by = run.part("stopped").get("by") or "a request"
        return f"Stopped by {by} after {steps} steps. To resume: --resume_from_checkpoint auto."
    if run.state == "failed":
        return f"Ended early: {steps} steps are logged."
    return f"{steps} steps are logged. The run was killed, or runs on a host that this one cannot see."


def _time_left(run: RunRecord) -> str:
    """Extrapolate from the last steps."""
    recent = [line["step_seconds"] for line in run.lines[-RECENT_LINES:] if line.get("step_seconds")]
    left = (_steps_planned(run) or 0) - run.steps
    return f", about {duration(left * median(recent))} to go" if recent and left > 0 else ""


def tiles(run: RunRecord) -> Rows:
    """Return the few numbers that are looked for first, as (label, number)."""
    losses = [line["loss"] for line in run.lines if line.get("loss") is not None]
    evaluations = [line["eval_loss"] for line in run.evaluations if line.get("eval_loss") is not None]
    rates = [line["supervised_tokens_per_second"] for line in run.lines if line.get("supervised_tokens_per_second")]
    planned = _steps_planned(run)
    rows = [
        (label, f"{values[0]:.4g} \N{RIGHTWARDS ARROW} {values[-1]:.4g}")
        for label, values in (("loss", losses), ("evaluation loss", evaluations))
        if values
    ]
    rows.append(("steps", f"{run.steps:,}" + (f" of {planned:,}" if planned and planned != run.steps else "")))
    if rates:
        rows.append(("supervised tokens/s", f"{median(rates):,.0f}"))
    if seconds := sum(seconds_of(run)):
        rows.append(("time in steps", duration(seconds)))
    if memory := _peak(run):
        rows.append(("peak memory of a rank", f"{memory / GIB:.2f} GiB"))
    return rows


def tile_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return the labels of the tiles of any of these runs, in order."""
    tables = sorted(map(tiles, runs), key=len, reverse=True)
    return list(dict.fromkeys(label for table in tables for label, _ in table))


def _peak(run: RunRecord) -> float:
    return max((line.get("peak_memory_bytes") or 0.0 for line in run.lines), default=0.0)


def _steps_planned(run: RunRecord) -> int | None:
    steps = run.part("plan").get("steps")
    return steps if isinstance(steps, int) else None


def duration(seconds: float) -> str:
    """Return seconds in readable units.

    >>> duration(3725)
    '62 min'
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
    """Return the plan that the run printed; None where run.json has none, or that of another version."""
    values = {name: value for name, value in run.part("plan").items() if name != "start_up"}  # of 0.1
    try:
        return from_json(TrainingPlan, values, "plan:")
    except TypeError:
        return None


def against_the_plan(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return (quantity, planned, actual); an empty text where there is no value."""
    plan, lines = stored_plan(run), run.lines
    rows: list[tuple[str, str, str]] = []
    if plan is not None:
        tokens, supervised = sum(tokens_of(run)), sum(tokens_of(run, "supervised_tokens_per_second"))
        logged = lines[-1]["step"] if lines else 0
        size = min(1.0, plan.per_device_batch * plan.accumulation * plan.data_ranks / (plan.groups or plan.examples))
        epochs = (lines[-1].get("epoch") or 0.0) if lines else 0.0
        rows += [
            ("Steps", f"{plan.steps:,}", f"{run.steps:,}"),
            ("Epochs", f"{plan.epochs:.3g}", f"{epochs:.3g}" if logged else ""),
            ("Tokens per step", f"about {plan.tokens * size:,.0f}", f"{tokens / logged:,.0f}" if logged else ""),
            ("Tokens in total", f"about {plan.tokens * plan.epochs:,.0f}", f"about {tokens:,.0f}" if logged else ""),
            ("Supervised share", f"{plan.supervised_share:.1%}", f"{supervised / tokens:.1%}" if tokens else ""),
            ("Trained parameters", f"{plan.trainable:,} ({plan.trainable / plan.parameters:.2%} of the model's)", ""),
        ]
    if lines:
        rows.append(("Time in steps", "", duration(sum(seconds_of(run)))))
    rows += [("Wall clock", "", text) for text in _wall_clock(run)]
    if memory := _peak(run):
        rows.append(("Peak memory of a rank", "", f"{memory / GIB:.2f} GiB"))
    return rows + _incidents(run)


def _wall_clock(run: RunRecord) -> list[str]:
    """Return when each start began and how it ended."""
    texts = []
    for start in run.listed("starts"):
        began, ended = (_moment(start.get(name)) for name in ("began", "ended"))
        if began is None:
            continue
        text = f"began {began:%Y-%m-%d %H:%M:%S}"
        if isinstance(step := start.get("from_step"), int) and step:
            text += f", from step {step:,}"
        if isinstance(lost := start.get("seconds_lost"), int | float):
            text += f", restarted after: {start.get('restarted_after')} ({duration(lost)} lost)"
        if ended is not None:
            text += f", {start.get('how') or 'ended'} after {duration((ended - began).total_seconds())}"
        texts.append(text)
    return texts


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")
    except (TypeError, ValueError):
        return None


def _incidents(run: RunRecord) -> list[tuple[str, str, str]]:
    rows = []
    if run.lines:
        lost = max(line.get("non_finite_steps") or 0 for line in run.lines)
        where = f"; {run.lost_rows:,} rows are in {nonfinite.NONFINITE_ROWS_FILE}" if run.lost_rows else ""
        rows.append(("Non-finite steps", "0", f"{lost:.0f}{where}"))
    for entry in run.listed("resumed"):
        changes = f", {len(entry['changes'])} changes allowed" if entry.get("changes") else ""
        rows.append(("Resumed", "", f"from step {entry.get('step')}{changes}: {entry.get('from')}"))
    left_out = run.part("data").get("left_out")
    if left_out:
        rows.append(("Rows left out", "0", f"{len(left_out):,}"))
    if run.unread:
        rows.append(("Lines of metrics.jsonl", "", f"{run.unread:,} could not be read"))
    return rows


def plan_lines(run: RunRecord) -> Rows:
    """Return the plan as the terminal showed it: (label, text)."""
    plan = stored_plan(run)
    pairs = (line.strip().partition(" ") for line in plan.lines()) if plan else ()
    return [(label, text.strip()) for label, _, text in pairs]
