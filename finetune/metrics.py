"""What a step logs, where it is written, and how it is shown at the end.

`metrics.jsonl` is standard JSON, one line per logged step; a value that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIELDS = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "peak_memory_bytes",
)


@dataclass
class StepMeter:
    """Counts one rank's tokens and the time since the last reading; counts are made on the host, without a sync."""

    tokens: int = 0
    supervised_tokens: int = 0
    steps: int = 0
    since: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """Begin a new interval."""
        self.tokens = self.supervised_tokens = self.steps = 0
        self.since = time.perf_counter()

    def add(self, tokens: int, supervised_tokens: int) -> None:
        """One optimizer step's tokens of this rank, padding not counted."""
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
        self.steps += 1

    def rates(self, tokens: int, supervised_tokens: int) -> dict[str, float]:
        """Seconds per step and, for the given counts of all ranks, tokens per second, over the interval."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        return {
            "step_seconds": round(seconds / max(self.steps, 1), 4),
            "tokens_per_second": round(tokens / seconds, 2),
            "supervised_tokens_per_second": round(supervised_tokens / seconds, 2),
        }


def peak_memory_bytes() -> int:
    """This rank's peak: memory allocated on its GPU, on a CPU its largest resident set."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def append_metrics(path: Path, logs: Mapping[str, Any]) -> None:
    """Add one line with the fields of `FIELDS` that were logged."""
    line = {name: _finite(logs[name]) for name in FIELDS if name in logs}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loss_curve(steps: Sequence[int], losses: Sequence[float], width: int, height: int = 12) -> str:
    """The loss over the steps, drawn with characters; empty with fewer than two points."""
    points = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if len(points) < 2:
        return ""
    import plotext

    plotext.clear_figure()
    plotext.plotsize(width, height)
    plotext.theme("clear")
    plotext.plot([step for step, _ in points], [loss for _, loss in points], marker="braille")
    plotext.title("loss by step")
    drawing = plotext.uncolorize(plotext.build()).rstrip()
    plotext.clear_figure()
    return drawing
