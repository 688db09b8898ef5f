"""The numbers of metrics.jsonl as columns, one set for each run, and the plots that show them."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from finetune.report.run_reader import RunRecord

MAX_POINTS, MAX_GROUPS, MAX_MARKS = 4_000, 12, 60
GIB = float(1 << 30)
# (column, title, unit, factor from the stored number to that unit)
PLOTS = (
    ("loss", "Loss", "", 1.0),
    ("learning_rate", "Learning rate", "", 1.0),
    ("grad_norm", "Gradient norm", "", 1.0),
    ("supervised_tokens_per_second", "Supervised tokens per second", "", 1.0),
    ("peak_memory_bytes", "Peak memory of a rank", "GiB", 1 / GIB),
    ("step_seconds", "Seconds per step", "s", 1.0),
    ("mfu", "Model FLOPs utilization", "%", 100.0),
)
GROUPED = (("loss_by_source", "Loss by source"), ("loss_by_turn", "Loss by answer of a conversation"))


def plot_data(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the numbers and plots of these runs as JSON values.

    `runs` have `x` (step, tokens and seconds up to each line), `columns`, `evaluations` and `groups` (loss by source
    and by turn). None in a column is a value that was not finite or not logged. `plots` leaves out those for which no
    run has a number.
    """
    series = [_series(run) for run in runs]
    plots = [
        {"key": key, "title": title, "unit": unit, "scale": scale, "grouped": False}
        for key, title, unit, scale in PLOTS
        if any(value is not None for run in series for value in run["columns"][key])
        or (key == "loss" and any(run["evaluations"]["loss"] for run in series))
    ]
    plots += [
        {"key": key, "title": title, "unit": "", "scale": 1.0, "grouped": True}
        for key, title in GROUPED
        if any(run["groups"][key] for run in series)
    ]
    return {"runs": series, "plots": plots}


def _series(run: RunRecord) -> dict[str, Any]:
    x: dict[str, list[float]] = {
        "step": [line["step"] for line in run.lines],
        "tokens": [round(total) for total in accumulate(tokens_of(run))],
        "seconds": [round(total, 1) for total in accumulate(seconds_of(run))],
    }
    shown = thinned([line.get("loss") for line in run.lines], MAX_POINTS)
    lost = [line["step"] for line in run.lines if line.get("loss") is None]
    return {
        "name": run.name,
        "x": {axis: [values[index] for index in shown] for axis, values in x.items()},
        "columns": {key: [run.lines[index].get(key) for index in shown] for key, *_ in PLOTS},
        "evaluations": {
            "x": {axis: [_x_at(line["step"], x["step"], x[axis]) for line in run.evaluations] for axis in x},
            "loss": [line.get("eval_loss") for line in run.evaluations],
        },
        "groups": {key: _groups(run, key, shown) for key, _ in GROUPED},
        "lost": lost[:MAX_MARKS],
        "resumed": [step for entry in run.listed("resumed") if isinstance(step := entry.get("step"), int)][:MAX_MARKS],
        "logged": len(run.lines),
    }


def seconds_of(run: RunRecord) -> list[float]:
    """Return the duration of the steps that each line covers."""
    steps = [0, *(line["step"] for line in run.lines)]
    return [
        (line.get("step_seconds") or 0.0) * (line["step"] - before)
        for before, line in zip(steps, run.lines, strict=False)
    ]


def tokens_of(run: RunRecord, column: str = "tokens_per_second") -> list[float]:
    """Return the number of tokens in the steps that each line covers."""
    return [(line.get(column) or 0.0) * seconds for line, seconds in zip(run.lines, seconds_of(run), strict=True)]


def _x_at(step: int, steps: Sequence[float], values: Sequence[float]) -> float:
    """Return the value of an axis when a step was logged; the step itself on the step axis."""
    if values is steps:
        return step
    index = bisect_right(steps, step)
    return values[index - 1] if index else 0.0


def _groups(run: RunRecord, key: str, shown: Sequence[int]) -> dict[str, list[float | None]]:
    """Return name -> values of the names that are logged most often; turns in their order."""
    counts = Counter(name for line in run.lines for name in line[key])
    names = [name for name, _ in counts.most_common(MAX_GROUPS)]
    if key == "loss_by_turn":
        names.sort(key=lambda name: (len(name), name))
    return {name: [run.lines[index][key].get(name) for index in shown] for name in names}


def thinned(values: Sequence[float | None], limit: int) -> list[int]:
    """Return indices of at most `limit` values, evenly spread: the lowest and highest of each stretch, and both ends.

    >>> thinned([5, 1, 9, 4, 3, 2, 8, 7], 6)
    [0, 1, 2, 5, 6, 7]
    """
    if len(values) <= limit:
        return list(range(len(values)))
    stretches = max((limit - 2) // 2, 1)
    kept = {0, len(values) - 1}
    for number in range(stretches):
        stretch = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        finite = [(value, index) for index in stretch if (value := values[index]) is not None]
        if finite:
            kept |= {min(finite)[1], max(finite, key=lambda pair: pair[0])[1]}
    return sorted(kept)
