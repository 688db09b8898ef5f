"""Numbers that are not finite: what is decided of each step, from what all ranks gave.

Every rank gives at the end of a step what was not finite on it, as bits. Each then decides alike, because all decide
from the same values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.distributed.collectives import run_on_all_ranks
from finetune.utils.errors import NumericsError, StorageError

NONFINITE_ROWS_FILE = "non_finite_rows.jsonl"
# What was not as it should be on a rank: a micro-batch's loss, the norm of the gradients; the step was left out, and
# that while fp16's loss scale could still come down.
LOSS, GRADIENT, LEFT_OUT, SEARCH = 1, 2, 4, 8
STEPS_IN_A_ROW, STEPS_IN_ALL, SHARE_OF_STEPS = 3, 3, 0.01
SHOWN_ROWS = 5
SIGN_OF_THE_LEAST_SCALE = "loss scale already at minimum"  # in the plain Exception of DeepSpeed's loss scaler


@dataclass(frozen=True)
class LossScale:
    """The factor that fp16 losses are multiplied by, and the least it may become."""

    value: float
    least: float


def finite_flags(losses: Sequence[float], grad_norm: float | None, *, left_out: bool, scale: LossScale | None) -> int:
    """What was not finite in a step of this rank.

    Args:
        losses: of its micro-batches; grad_norm: None where nobody computes it.
        left_out: the optimizer made no step.
        scale: fp16's, as it was before this step; None where there is none that moves.
    """
    bits = 0 if all(map(math.isfinite, losses)) else LOSS
    bits |= 0 if grad_norm is None or math.isfinite(grad_norm) else GRADIENT
    if left_out:
        bits |= LEFT_OUT | (SEARCH if scale is not None and scale.value > scale.least else 0)
    return bits


def is_loss_scale_search(bits: Sequence[int]) -> bool:
    """Whether this step was left out, and that is how fp16 finds its loss scale: gradients too large for the type while
    the scale can come down and each rank's losses are finite."""
    return any(one & SEARCH for one in bits) and not any(one & LOSS for one in bits)


def all_finite(bits: Sequence[int]) -> bool:
    """Whether nothing was found on any rank."""
    return not any(bits)


def is_minimum_scale_error(error: Exception) -> bool:
    """Whether DeepSpeed gave up: the gradients overflow fp16 even at the least loss scale."""
    return SIGN_OF_THE_LEAST_SCALE in str(error)


@dataclass
class NonFiniteCounter:
    """Steps that were not finite, in the whole run and one after the other up to now; and those without a loss since
    the last line that was logged."""

    steps: int = 0
    in_a_row: int = 0
    lost_since_log: int = 0

    def add(self, step: int, max_steps: int) -> str | None:
        """One more; why the run ends with it, or None where it goes on. `step` counts from 1, over the whole run."""
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
        """A mean over `steps` to which those without a finite loss added nothing -> over the others; NaN: there are
        none."""
        if not self.lost_since_log:
            return mean
        finite = steps - self.lost_since_log
        return mean * steps / finite if finite > 0 else math.nan


def describe_nonfinite(bits: Sequence[int], records: Sequence[Mapping[str, Any]], grad_norm: float | None) -> str:
    """What was not finite, and on which ranks: `on rank 1 loss is nan`; `grad_norm is inf`, which is of all ranks."""
    ranks = [str(rank) for rank, one in enumerate(bits) if one & LOSS]
    if ranks:
        found = next((record["found"] for record in records if record["found"]), "not finite")
        return f"on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} loss is {found}"
    return f"grad_norm is {grad_norm}" if any(one & GRADIENT for one in bits) else "the optimizer made no step"


def describe_rows(records: Sequence[Mapping[str, Any]]) -> str:
    """`data.json:17, data.json:3` as --skip_rows takes them; the first few and the count."""
    names = list(dict.fromkeys(f"{record['source']}:{record['row']}" for record in records))
    more = f" and {len(names) - SHOWN_ROWS:,} more" if len(names) > SHOWN_ROWS else ""
    return (", ".join(names[:SHOWN_ROWS]) + more) or "none"


def finite_or_none(value: Any) -> Any:
    """The same, but None for a number that is not finite: standard JSON has no other name for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add one line of standard JSON per row of a micro-batch that was not finite.

    Fields: `source`, `row` (counted from 0 in that file), `id`, `text` (decoded tokens), `step`, `rank`, `micro_batch`,
    `found` ("nan", "inf", "-inf"; null where this loss was finite and the gradient was not), and `loss`: what the
    micro-batch adds to that of the step, null where it is not finite.

    Raises:
        StorageError: the disk refused.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in records)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def check_weights(model: Any, place: str, advice: str) -> None:
    """All trained weights are finite, each rank's share of them; all ranks. One pass, without memory of its own.

    Raises:
        NumericsError: on every rank; `place` says what is not written.
    """

    def check() -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not _is_finite(_own_share(parameter)):
                raise NumericsError(f"{place}: the weights of {name} are not finite: it is not saved; {advice}")

    run_on_all_ranks(check)


def _own_share(parameter: Any) -> Any:
    """This rank's part of a weight under ZeRO-3, without what fills the last part up: that is never written to."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach()
    begin = shard.numel() * parameter.ds_process_group.rank()
    return shard.detach().flatten()[: max(0, parameter.ds_numel - begin)]


def _is_finite(weights: Any) -> bool:
    if weights.numel() == 0 or not weights.is_floating_point():
        return True
    least, most = weights.aminmax()
    return math.isfinite(least) and math.isfinite(most)
