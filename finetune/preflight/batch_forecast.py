"""Forecast of a run without its model: batches, steps, tokens, and the largest micro-batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune.config.run_config import BatchConfig, ScheduleConfig
from finetune.dataset.dataloader import BatchLayout
from finetune.dataset.prepare import PreparedData
from finetune.dataset.sampler import Sampler
from finetune.training.dataloaders import batch_layout, train_sampler

# In a longer epoch only the micro-batches of its first steps are looked at.
MAX_STEPS, FIRST_STEPS = 400, 3


@dataclass(frozen=True)
class LargestBatch:
    """The most rows, tokens (padding included) and positions with logits of any micro-batch of a rank."""

    rows: int = 0
    tokens: int = 0
    logits: int = 0


@dataclass(frozen=True)
class BatchForecast:
    """How conversations become micro-batches."""

    layout: BatchLayout
    sampler: Sampler
    largest: LargestBatch  # of an epoch
    first: LargestBatch  # of its first three steps, which a short trial run sees
    longest: int  # tokens of the longest example
    steps: int  # of the whole run

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
            "selects_logits": self.layout.selects_logits,
        }


def forecast_batches(
    batch: BatchConfig, schedule: ScheduleConfig, data: PreparedData, *, selects_logits: bool, obstacle: str | None
) -> BatchForecast:
    """Form the micro-batches of the first epoch; `obstacle` says why the model cannot run padding-free batches."""
    from finetune.dataset.dataloader import int_column

    examples = data.epoch(batch.seed).examples
    lengths, supervised = int_column(examples, "length"), int_column(examples, "num_supervised")
    longest = int(lengths.max())
    layout = batch_layout(batch, longest, batch.padding_reason or obstacle, selects_logits)
    sampler = train_sampler(batch, layout, lengths)
    largest = first = np.zeros(3, dtype=int)
    for step in range(min(sampler.steps_per_epoch, MAX_STEPS)):
        for number in range(sampler.micro_batches(step)):
            for rank in range(sampler.shape.world_size):
                rows = sampler.micro_batch(0, step, rank, number)
                if rows:
                    is_padded = sampler.batching == "padded"
                    tokens = lengths[rows].max() * len(rows) if is_padded else lengths[rows].sum()
                    logits = supervised[rows].sum() if layout.selects_logits else tokens
                    largest = np.maximum(largest, (len(rows), tokens, logits))
        first = largest if step < FIRST_STEPS else first
    steps = schedule.max_steps
    if steps <= 0:  # as the Trainer counts
        steps = int(np.ceil(schedule.num_train_epochs * sampler.steps_per_epoch))
    of_epoch, of_first_steps = LargestBatch(*largest.tolist()), LargestBatch(*first.tolist())
    return BatchForecast(layout, sampler, of_epoch, of_first_steps, longest, steps)
