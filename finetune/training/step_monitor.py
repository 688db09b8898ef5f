"""What all ranks decide at the end of each optimizer step: stop, skip, save later, or fail."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from finetune.distributed import stop_requests
from finetune.distributed.collectives import all_gather_ints, all_gather_object, host_names, run_on_all_ranks
from finetune.training import nonfinite
from finetune.training.nonfinite import LossScale, NonFiniteCounter
from finetune.utils.atomic_io import append_json_lines

logger = logging.getLogger(__name__)

DescribeRows = Callable[[int, int], list[dict[str, Any]]]
STEPS_COMPARED, STEPS_BETWEEN_LOOKS, STEPS_OF_SILENCE = 10, 5, 500
SECONDS_THAT_MATTER, SHARE_THAT_MATTERS = 0.05, 0.2


@dataclass(frozen=True)
class Straggler:
    """A slow rank: its compute seconds per step, those of the others, and the seconds of the whole step."""

    rank: int
    seconds: float
    others: float
    step_seconds: float

    @property
    def cost(self) -> float:
        return self.seconds - self.others


def find_straggler(own: Sequence[Sequence[float]], step_seconds: Sequence[float]) -> Straggler | None:
    """Return the slowest rank if it costs 50 ms and a fifth of the step; medians over the steps.

    Args:
        own: [ranks][steps], compute seconds of each rank.
        step_seconds: [steps], of whole steps.
    """
    if len(own) < 2 or not step_seconds:
        return None
    by_rank = [median(seconds) for seconds in own]
    rank = max(range(len(by_rank)), key=by_rank.__getitem__)
    others = median(seconds for other, seconds in enumerate(by_rank) if other != rank)
    straggler = Straggler(rank, by_rank[rank], others, median(step_seconds))
    threshold = max(SECONDS_THAT_MATTER, SHARE_THAT_MATTERS * straggler.step_seconds)
    return straggler if straggler.cost > threshold else None


@dataclass
class Stragglers:
    """Look for a slow rank every few steps; report the same one again only after many steps."""

    steps: deque = field(default_factory=lambda: deque(maxlen=STEPS_COMPARED))
    seen: int = 0
    named: dict[int, int] = field(default_factory=dict)

    def add(self, own: Sequence[float], step_seconds: float) -> Straggler | None:
        """Add the compute seconds of each rank and the seconds of the step; return a rank to report now, or None."""
        self.steps.append((tuple(own), step_seconds))
        self.seen += 1
        if len(self.steps) < STEPS_COMPARED or self.seen % STEPS_BETWEEN_LOOKS:
            return None
        by_rank = list(zip(*(seconds for seconds, _ in self.steps), strict=True))
        straggler = find_straggler(by_rank, [seconds for _, seconds in self.steps])
        if straggler is None or self.seen - self.named.get(straggler.rank, -STEPS_OF_SILENCE) < STEPS_OF_SILENCE:
            return None
        self.named[straggler.rank] = self.seen
        return straggler


class ComputeTimer:
    """Measure the seconds of a step that a rank computes before it first waits for others.

    The measurement starts where the last exchange, save or logged line ended, so that loading data counts, and stops
    after the forward pass: of the first micro-batch under ZeRO-2, which reduces gradients in each backward pass, else
    of the last one. Where a forward pass contains collectives itself (ZeRO-3, sequence parallelism, DDP's buffers) it
    stops before the first one, and a slow forward pass is not seen.
    """

    def __init__(self, device: torch.device, *, waits_in_forward: bool, waits_in_each_backward: bool) -> None:
        self.waits_in_forward, self.waits_in_each_backward = waits_in_forward, waits_in_each_backward
        self.on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Start the next step."""
        self.start: tuple[float, Any] = self._now()
        self.stop: tuple[float, Any] | None = None

    def before_forward(self) -> None:
        if self.waits_in_forward and self.stop is None:
            self.stop = self._now()

    def after_forward(self) -> None:
        if not self.waits_in_forward and not (self.waits_in_each_backward and self.stop is not None):
            self.stop = self._now()

    def compute_seconds(self) -> float:
        """Seconds of this step on this rank alone; on a GPU the longer of the host's and the device's."""
        if self.stop is None:
            return 0.0
        host = self.stop[0] - self.start[0]
        return max(host, self.start[1].elapsed_time(self.stop[1]) / 1000) if self.on_gpu else host

    def step_seconds(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.start[0]

    def _now(self) -> tuple[float, Any]:
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        if event is not None:
            event.record()
        return time.perf_counter(), event


@dataclass(frozen=True)
class StepReport:
    """One optimizer step as this rank saw it."""

    step: int
    max_steps: int
    losses: list[float]  # of its micro-batches, summed over tokens, divided by the denominator of the whole step
    grad_norm: float | None  # over all ranks; None where nobody computes it
    skipped: bool  # the optimizer made no step
    scale: LossScale | None  # of fp16 before the step; None without one that moves
    next_scale: LossScale | None  # after it
    describe_rows: DescribeRows  # (step, micro-batch) -> source, row, id and text of the rows in it


@dataclass(frozen=True)
class StepDecision:
    """What follows from a step, the same on every rank."""

    stopped_by: str | None = None  # the request that ends the run after this step
    loss_is_lost: bool = False  # the step's loss does not count in the logged mean
    is_finite: bool = True  # nothing was non-finite on any rank, a search for the loss scale aside
    is_clean: bool = True  # the step was applied and finite on all ranks
    error: str | None = None  # why the run cannot continue, without advice


class StepMonitor:
    """Exchange three integers between all ranks at the end of each step, and decide alike on each. All ranks.

    The host reads losses here and nowhere else: DeepSpeed waits for the device at the end of a step anyway.

    Args:
        rows_file: where the rows of non-finite steps are recorded, by the ranks with `writes`.
    """

    def __init__(self, device: torch.device, rank: int, world_size: int, rows_file: Path, *, writes: bool) -> None:
        self.device, self.rank, self.world_size = device, rank, world_size
        self.rows_file, self.writes = rows_file, writes
        self.count, self.stragglers = NonFiniteCounter(), Stragglers()
        self._hosts = host_names()

    def end_step(self, report: StepReport, timer: ComputeTimer) -> StepDecision:
        """Compare a step over all ranks."""
        flags = nonfinite.finite_flags(report.losses, report.grad_norm, left_out=report.skipped, scale=report.scale)
        values = [int(stop_requests.stop_requested()), flags, int(timer.compute_seconds() * 1e6)]
        requests, all_flags, microseconds = zip(*all_gather_ints(values, self.device), strict=True)
        straggler = self.stragglers.add([value / 1e6 for value in microseconds], timer.step_seconds())
        if straggler is not None:
            logger.warning(
                f"rank {straggler.rank} on {self._hosts[straggler.rank]} is slow: it computes "
                f"{straggler.seconds:.2f} s of each step, the others {straggler.others:.2f} s, and all wait for it: "
                f"{straggler.cost:.2f} of {straggler.step_seconds:.2f} s a step"
            )
        decision = StepDecision()
        if nonfinite.is_loss_scale_search(all_flags):
            decision = StepDecision(is_clean=False)
            logger.warning(
                f"step {report.step} was skipped: its gradients are too large for fp16 though each loss is finite; the "
                f"loss scale is {report.next_scale.value if report.next_scale else 1:g} now"
            )
        elif any(all_flags):
            decision = self._not_finite(report, all_flags)
        else:
            self.count.in_a_row = 0
        if any(requests) and decision.error is None and report.step < report.max_steps:
            by = next(filter(None, all_gather_object(stop_requests.stop_reason())))
            decision = replace(decision, stopped_by=by)
        return decision

    def _not_finite(self, report: StepReport, flags: tuple[int, ...]) -> StepDecision:
        """Count the step and report the rows in it; an error where there are too many."""
        any_loss = any(value & nonfinite.LOSS for value in flags)
        records = self._records(report, only_lost=any_loss)
        run_on_all_ranks(lambda: append_json_lines(self.rows_file, records) if self.writes else None)
        if any_loss:
            self.count.lost_since_log += 1
        reason = self.count.add(report.step, report.max_steps)
        what = nonfinite.describe_nonfinite(flags, records, report.grad_norm)
        rows = nonfinite.describe_rows(records)
        was_applied = not any(value & nonfinite.LEFT_OUT for value in flags)
        outcome = "its gradient is finite and was applied" if was_applied else "the step was skipped, no weight changed"
        logger.warning(
            f"step {report.step}: {what}; rows {rows}; {outcome}; {self.count.steps} of {report.step} steps were not "
            "finite"
        )
        error = None
        if reason is not None:
            error = (
                f"step {report.step}: {what}: lower --learning_rate, warm up longer (--warmup_steps), or skip these "
                f"rows: {rows}. The run ends because {reason}."
            )
        return StepDecision(None, any_loss, False, False, error)

    def _records(self, report: StepReport, *, only_lost: bool) -> list[dict[str, Any]]:
        """Rows of the micro-batches with a non-finite loss, or of all where only the gradient was; of all ranks."""
        records = []
        for micro_batch, loss in enumerate(report.losses):
            is_lost = not math.isfinite(loss)
            if only_lost and not is_lost:
                continue
            fields: dict[str, Any] = {"step": report.step, "rank": self.rank, "micro_batch": micro_batch}
            fields |= {"found": str(loss), "loss": None} if is_lost else {"found": None, "loss": loss / self.world_size}
            records += [{**row, **fields} for row in report.describe_rows(report.step, micro_batch)]
        gathered = [record for of_rank in all_gather_object(records) for record in of_rank]
        # Ranks that share conversations report the same rows.
        unique = {(row["source"], row["row"], row["micro_batch"], row["text"]): row for row in gathered}
        return list(unique.values())
