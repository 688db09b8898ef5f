"""Non-finite losses and gradients: flags of each step, counters, records of the rows, checks of the weights.

Every rank contributes flags at the end of a step; all ranks decide alike from the same values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.distributed.collectives import run_on_all_ranks
from finetune.models.base_checks import is_finite
from finetune.models.zero3 import values_here
from finetune.utils.errors import NumericsError

# One line for each row of a non-finite micro-batch: `source`, `row` (counted from 0 there), `id`, `text`, `step`,
# `rank`, `micro_batch`, `found` ("nan", "inf", "-inf"; null where only the gradient was not finite), and `loss`: what
# the micro-batch adds to that of the step, null where it is not finite.
NONFINITE_ROWS_FILE = "non_finite_rows.jsonl"
# Flags of a rank: a micro-batch's loss or the gradient norm is non-finite; the step was skipped; fp16's loss scale can
# still be lowered.
LOSS, GRADIENT, LEFT_OUT, SEARCH = 1, 2, 4, 8
STEPS_IN_A_ROW, STEPS_IN_ALL, SHARE_OF_STEPS = 3, 3, 0.01
SHOWN_ROWS = 5
MINIMUM_SCALE_ERROR = "loss scale already at minimum"  # in the plain Exception of DeepSpeed's loss scaler


@dataclass(frozen=True)
class LossScale:
    """The factor of fp16 losses, and its minimum."""

    value: float
    least: float


def finite_flags(losses: Sequence[float], grad_norm: float | None, *, left_out: bool, scale: LossScale | None) -> int:
    """Return the flags of a step of this rank; see `step_monitor.StepReport`. `left_out`: the optimizer made none."""
    bits = 0 if all(map(math.isfinite, losses)) else LOSS
    bits |= 0 if grad_norm is None or math.isfinite(grad_norm) else GRADIENT
    if left_out:
        bits |= LEFT_OUT | (SEARCH if scale is not None and scale.value > scale.least else 0)
    return bits


def is_loss_scale_search(bits: Sequence[int]) -> bool:
    """Whether the step was skipped because fp16 searches its loss scale: gradients overflow while the scale can be
    lowered, and the losses of all ranks are finite."""
    return any(flags & SEARCH for flags in bits) and not any(flags & LOSS for flags in bits)


@dataclass
class NonFiniteCounter:
    """Non-finite steps: of the whole run, in a row up to now, and without a loss since the last logged line."""

    steps: int = 0
    in_a_row: int = 0
    lost_since_log: int = 0

    def add(self, step: int, max_steps: int) -> str | None:
        """Count one; return why the run ends with it, or None. `step` counts from 1, over the whole run."""
        self.steps += 1
        self.in_a_row += 1
        if self.in_a_row >= STEPS_IN_A_ROW:
            return f"the last {self.in_a_row} steps were not finite"
        if self.steps >= STEPS_IN_ALL and self.steps > SHARE_OF_STEPS * step:
            return f"{self.steps} of {step} steps were not finite"
        if step >= max_steps and self.steps >= step:
            return "no step of the run was finite"
        return None

    def mean_without(self, mean: float, steps: int) -> float:
        """Correct a mean over `steps` in which steps without a finite loss counted as 0; NaN: no step had one."""
        if not self.lost_since_log:
            return mean
        finite = steps - self.lost_since_log
        return mean * steps / finite if finite > 0 else math.nan


def describe_nonfinite(bits: Sequence[int], records: Sequence[Mapping[str, Any]], grad_norm: float | None) -> str:
    """Describe what was non-finite, and on which ranks: `on rank 1 loss is nan`, `grad_norm is inf`."""
    ranks = [str(rank) for rank, flags in enumerate(bits) if flags & LOSS]
    if ranks:
        value = next((record["found"] for record in records if record["found"]), "not finite")
        return f"on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} loss is {value}"
    return f"grad_norm is {grad_norm}" if any(flags & GRADIENT for flags in bits) else "the optimizer made no step"


def describe_rows(records: Sequence[Mapping[str, Any]]) -> str:
    """Return `data.json:17, data.json:3` as --skip_rows takes them; the first few and the count."""
    names = list(dict.fromkeys(f"{record['source']}:{record['row']}" for record in records))
    more = f" and {len(names) - SHOWN_ROWS:,} more" if len(names) > SHOWN_ROWS else ""
    return (", ".join(names[:SHOWN_ROWS]) + more) or "none"


def finite_or_none(value: Any) -> Any:
    """Return None for a non-finite number, which standard JSON lacks; other values as they are."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_weights(model: Any, place: str, advice: str) -> None:
    """Check that all trained weights are finite, each rank its share; `place` says what is not written. All ranks."""

    def check() -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not is_finite(values_here(parameter)):
                raise NumericsError(f"{place} is not saved: the weights of {name} are not finite; {advice}")

    run_on_all_ranks(check)
