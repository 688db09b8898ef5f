"""What a run will do, told without a model: its batches, its steps, its tokens, what each step holds at most."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune.config.run_config import BatchConfig, ScheduleConfig
from finetune.dataset.prepare import PreparedData
from finetune.dataset.sampler import Sampler
from finetune.training.dataloaders import batch_layout, train_sampler

# Of a longer epoch the micro-batches of its first steps are looked at, and the largest rows.
STEPS_LOOKED_AT, FIRST_STEPS = 400, 3


@dataclass(frozen=True)
class LargestBatch:
    """Of the micro-batches that a rank gets, padding counted: most rows, most tokens, most positions with logits."""

    rows: int = 0
    tokens: int = 0
    logits: int = 0

    def with_another(self, rows: int, tokens: int, logits: int) -> LargestBatch:
        """The largest of these and one more."""
        return LargestBatch(max(self.rows, rows), max(self.tokens, tokens), max(self.logits, logits))


@dataclass(frozen=True)
class BatchForecast:
    """How conversations become micro-batches.

    Attributes:
        largest: micro-batch of an epoch. first: of its first three steps, which a short trial sees.
        longest: tokens of the longest example.
        steps: of the whole run.
    """

    form: Any
    sampler: Sampler
    largest: LargestBatch
    first: LargestBatch
    longest: int
    steps: int

    def facts(self, batch: BatchConfig) -> dict[str, Any]:
        """Return JSON values: the arithmetic of a step, written out."""
        shape, sampler = self.sampler.shape, self.sampler
        sharing = batch.sequence_parallel_size
        units = "examples" if sampler.capacity is None else f"groups of up to {sampler.capacity:,} tokens"
        ranks = f"{batch.world_size} ranks" if sharing == 1 else f"{shape.world_size} groups of {sharing} ranks"
        tokens = int(sampler.lengths.sum())
        return {
            "arithmetic": f"{shape.per_device_batch} per device x {shape.accumulation} accumulated x {ranks} = "
            f"{shape.step_size} {units}",
            "batching": sampler.batching,
            "examples": len(sampler.lengths),
            "units": sampler.num_units,
            "steps_per_epoch": sampler.steps_per_epoch,
            "steps": self.steps,
            "tokens_per_step": round(tokens * min(1.0, shape.step_size / max(sampler.num_units, 1))),
            "largest_micro_batch": asdict(self.largest),
            "largest_of_the_first_steps": asdict(self.first),
            "longest_example": self.longest,
            "selects_logits": self.form.selects_logits,
        }


def forecast_batches(
    batch: BatchConfig, schedule: ScheduleConfig, data: PreparedData, *, selects_logits: bool, obstacle: str | None
) -> BatchForecast:
    """The micro-batches of the first epoch.

    Args:
        selects_logits: whether the model's code can compute logits at given positions alone.
        obstacle: why its config says that it cannot run flat rows.

    Raises:
        ConfigError: as the run's own plan.
    """
    from finetune.dataset.dataloader import int_column

    examples = data.epoch(batch.seed).examples
    lengths, learned = int_column(examples, "length"), int_column(examples, "num_supervised")
    form = batch_layout(batch, int(lengths.max()), batch.padding_reason or obstacle, selects_logits)
    sampler = train_sampler(batch, form, lengths)
    largest = first = LargestBatch()
    for step in range(min(sampler.steps_per_epoch, STEPS_LOOKED_AT)):
        for number in range(sampler.micro_batches(step)):
            for rank in range(sampler.shape.world_size):
                mine = sampler.micro_batch(0, step, rank, number)
                if mine:
                    here = lengths[mine]
                    tokens = int(here.max()) * len(mine) if sampler.batching == "padded" else int(here.sum())
                    seen = int(learned[mine].sum()) if form.selects_logits else tokens
                    largest = largest.with_another(len(mine), tokens, seen)
        first = largest if step < FIRST_STEPS else first
    return BatchForecast(form, sampler, largest, first, int(lengths.max()), _steps(schedule, sampler))


def _steps(schedule: ScheduleConfig, sampler: Sampler) -> int:
    """Return the optimizer steps of the whole run, as the Trainer counts them."""
    if schedule.max_steps > 0:
        return schedule.max_steps
    return int(np.ceil(schedule.num_train_epochs * sampler.steps_per_epoch))
