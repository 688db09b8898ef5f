"""What is drawn: the numbers of metrics.jsonl as columns, one set for each run, and the plots that show them."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from finetune.report.run_reader import RunRecord

MOST_POINTS = 4_000
MOST_GROUPS = 12
MOST_MARKS = 60
GIB = float(1 << 30)
# (column, title, unit, what a number is multiplied with to be shown in it)
PLOTS = (
    ("loss", "Loss", "", 1.0),
    ("learning_rate", "Learning rate", "", 1.0),
    ("grad_norm", "Gradient norm", "", 1.0),
    ("supervised_tokens_per_second", "Learned tokens per second", "", 1.0),
    ("peak_memory_bytes", "Peak memory of a rank", "GiB", 1 / GIB),
    ("step_seconds", "Seconds per step", "s", 1.0),
    ("mfu", "Share of the peak arithmetic", "%", 100.0),
)
GROUPED = (("loss_by_source", "Loss by source"), ("loss_by_turn", "Loss by answer of a conversation"))
COLUMNS = tuple(key for key, *_ in PLOTS)


def drawn(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The plots of these runs as JSON values; a plot for which no run has a number is left out.

    `runs` have `x` (step, tokens and seconds up to each line) and `columns`; `evaluations` and `groups` (loss by source
    and by turn) stand beside them. A null in a column is a value that was not finite or not logged.
    """
    series = [_series(run) for run in runs]
    plots = [
        {"key": key, "title": title, "unit": unit, "scale": scale, "grouped": False}
        for key, title, unit, scale in PLOTS
        if any(value is not None for one in series for value in one["columns"][key])
        or (key == "loss" and any(one["evaluations"]["loss"] for one in series))
    ]
    plots += [
        {"key": key, "title": title, "unit": "", "scale": 1.0, "grouped": True}
        for key, title in GROUPED
        if any(one["groups"][key] for one in series)
    ]
    return {"runs": series, "plots": plots}


def _series(run: RunRecord) -> dict[str, Any]:
    durations = seconds_of(run)
    tokens = tokens_of(run)
    x = {
        "step": [line["step"] for line in run.lines],
        "tokens": [round(one) for one in accumulate(tokens)],
        "seconds": [round(one, 1) for one in accumulate(durations)],
    }
    kept = thinned([line.get("loss") for line in run.lines], MOST_POINTS)
    lost = [line["step"] for line in run.lines if line.get("loss") is None]
    return {
        "name": run.name,
        "x": {name: [values[at] for at in kept] for name, values in x.items()},
        "columns": {key: [run.lines[at].get(key) for at in kept] for key in COLUMNS},
        "evaluations": {
            "x": {name: [_at(one["step"], x["step"], x[name]) for one in run.evaluations] for name in x},
            "loss": [one.get("eval_loss") for one in run.evaluations],
        },
        "groups": {key: _groups(run, key, kept) for key, _ in GROUPED},
        "lost": lost[:MOST_MARKS],
        "resumed": [step for one in run.listed("resumed") if isinstance(step := one.get("step"), int)][:MOST_MARKS],
        "logged": len(run.lines),
    }


def seconds_of(run: RunRecord) -> list[float]:
    """How long the steps of each line took."""
    before = 0
    found = []
    for line in run.lines:
        found.append((line.get("step_seconds") or 0.0) * (line["step"] - before))
        before = line["step"]
    return found


def tokens_of(run: RunRecord, column: str = "tokens_per_second") -> list[float]:
    """How many tokens the steps of each line had."""
    return [(line.get(column) or 0.0) * long for line, long in zip(run.lines, seconds_of(run), strict=True)]


def _at(step: int, steps: Sequence[int], values: Sequence[float]) -> float:
    """What had come together when a step was logged; the step itself, where that is asked for."""
    if values is steps:
        return step
    place = bisect_right(steps, step)
    return values[place - 1] if place else 0.0


def _groups(run: RunRecord, key: str, kept: Sequence[int]) -> dict[str, list[float | None]]:
    """Name -> values, of the names that are logged most often; turns in their order."""
    counts = Counter(name for line in run.lines for name in line[key])
    names = [name for name, _ in counts.most_common(MOST_GROUPS)]
    if key == "loss_by_turn":
        names.sort(key=lambda name: (len(name), name))
    return {name: [run.lines[at][key].get(name) for at in kept] for name in names}


def thinned(values: Sequence[float | None], most: int) -> list[int]:
    """Places of at most `most` values, evenly spread: of each stretch its lowest and its highest, and both ends.

    >>> thinned([5, 1, 9, 4, 3, 2, 8, 7], 6)
    [0, 1, 2, 5, 6, 7]
    """
    if len(values) <= most:
        return list(range(len(values)))
    stretches = max((most - 2) // 2, 1)
    kept = {0, len(values) - 1}
    for number in range(stretches):
        here = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        finite = [at for at in here if values[at] is not None]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)
