"""(seed, epoch, optimizer step, rank, micro-batch) -> row ids; integers only.

What a step learns from depends on its size alone, not on how ranks and accumulation make it up: 1 rank x 8 rows,
2 x 4 and 2 x 2 x 2 accumulated see the same rows in every step. Each row comes once an epoch; the last step is short
where the rows do not divide, and no row is repeated to fill it. A rank that has nothing left then gets an empty
micro-batch. Within a step, work is dealt so that the ranks of a micro-batch have alike.

All of it is a function of its arguments: the step is the whole state, and resuming is starting from another step.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune.dataset.packing import best_fit_decreasing, rectangles

Batching = Literal["flat", "padded", "packed"]
Order = Literal["random", "sequential", "group_by_length"]

# A token budget is filled from this many batches' worth of rows in random order: enough to fill them well, few enough
# that long and short rows stay mixed.
BATCHES_FILLED_TOGETHER = 32
STEPS_GROUPED_TOGETHER = 50
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class BatchShape:
    """How a step is made up; `per_device_batch` counts rows, or groups of rows where there is a token capacity."""

    per_device_batch: int
    accumulation: int
    world_size: int

    @property
    def micro_batch_size(self) -> int:
        """Rows or groups of a micro-batch, over all ranks."""
        return self.per_device_batch * self.world_size

    @property
    def step_size(self) -> int:
        """Rows or groups of a full step."""
        return self.micro_batch_size * self.accumulation


class Sampler:
    """Which rows a micro-batch holds.

    Args:
        lengths: tokens of each row, int array [rows].
        shape: of a step.
        capacity: tokens of a group of rows, a unit that stays together; None where each row is a unit of its own.
        batching: what is made of a micro-batch. `padded` ones of a step get rows of like length each; the others are
            dealt so that their sums are alike.
        order: of an epoch. `group_by_length` puts rows of like length into the same step.
        drop_last: leave out the last step of an epoch where it is short.

    Raises:
        ValueError: a row is longer than `capacity`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        shape: BatchShape,
        *,
        seed: int,
        batching: Batching = "flat",
        capacity: int | None = None,
        order: Order = "random",
        drop_last: bool = False,
    ) -> None:
        self.lengths, self.shape, self.seed = np.asarray(lengths, dtype=np.int64), shape, seed
        self.batching, self.capacity, self.order, self.drop_last = batching, capacity, order, drop_last
        self.groups = None if capacity is None else self._grouped(capacity)
        self._unit_lengths = (
            self.lengths
            if self.groups is None
            else np.array([self.lengths[group].sum() for group in self.groups], dtype=np.int64)
        )
        self._epoch: tuple[int, np.ndarray] | None = None
        self._step: tuple[tuple[int, int], list[list[list[int]]]] | None = None

    def _grouped(self, capacity: int) -> list[np.ndarray]:
        """Groups that fill `capacity` tokens, the same in every epoch: their order is drawn anew, not their rows."""
        rows = self._ordered(len(self.lengths), 0, "rows")
        windows = [rows]
        if self.batching != "packed":  # which are as full as can be: all rows together
            filled = np.cumsum(self.lengths[rows]) // (capacity * BATCHES_FILLED_TOGETHER)
            windows = np.split(rows, np.flatnonzero(np.diff(filled)) + 1)
        fill = rectangles if self.batching == "padded" else best_fit_decreasing
        return [window[members] for window in windows for members in fill(self.lengths[window].tolist(), capacity)]

    @property
    def num_units(self) -> int:
        """Rows, or groups of rows where there is a capacity."""
        return len(self._unit_lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of every epoch."""
        full, rest = divmod(self.num_units, self.shape.step_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of every rank in an epoch; only the last step may have fewer than the others."""
        steps = self.steps_per_epoch
        return (steps - 1) * self.shape.accumulation + self.micro_batches(steps - 1) if steps else 0

    def micro_batches(self, step: int) -> int:
        """Micro-batches of every rank in this step of an epoch."""
        left = self.num_units - step * self.shape.step_size
        return -(-min(self.shape.step_size, left) // self.shape.micro_batch_size)

    def position(self, global_step: int) -> tuple[int, int]:
        """(epoch, step of that epoch) of a step that is counted over the whole run."""
        return divmod(global_step, self.steps_per_epoch)

    def micro_batch(self, epoch: int, step: int, rank: int, micro_batch: int) -> list[int]:
        """Row ids; none where this rank has nothing left to do."""
        if self._step is None or self._step[0] != (epoch, step):
            self._step = ((epoch, step), self._dealt(epoch, step))
        return self._rows(self._step[1][micro_batch][rank])

    def step_rows(self, epoch: int, step: int) -> list[int]:
        """Row ids of a whole step, over all ranks and micro-batches."""
        return self._rows(self._units(epoch, step))

    def _rows(self, units: np.ndarray | list[int]) -> list[int]:
        if self.groups is None:
            return [int(unit) for unit in units]
        return [int(row) for unit in units for row in self.groups[unit]]

    def _units(self, epoch: int, step: int) -> np.ndarray:
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch}")
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._epoch_order(epoch))
        return self._epoch[1][step * self.shape.step_size : (step + 1) * self.shape.step_size]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        units = self._ordered(self.num_units, epoch, "units")
        if self.order != "group_by_length":
            return units
        size = self.shape.step_size
        whole = len(units) // size * size
        windows = np.split(units[:whole], range(size * STEPS_GROUPED_TOGETHER, whole, size * STEPS_GROUPED_TOGETHER))
        by_length = np.concatenate([one[np.argsort(-self._unit_lengths[one], kind="stable")] for one in windows])
        steps = by_length.reshape(-1, size)[self._ordered(whole // size, epoch, "steps")]
        return np.concatenate([steps.ravel(), units[whole:]])

    def _ordered(self, count: int, epoch: int, what: str) -> np.ndarray:
        return np.arange(count) if self.order == "sequential" else shuffled(count, self.seed, epoch, what)

    def _dealt(self, epoch: int, step: int) -> list[list[list[int]]]:
        """Units by micro-batch and rank. Every other micro-batch is dealt backwards: no rank always has the most."""
        units = self._units(epoch, step)
        units = units[np.argsort(-self._unit_lengths[units], kind="stable")].tolist()
        world_size, size = self.shape.world_size, self.shape.per_device_batch
        count = self.micro_batches(step) * world_size
        if self.batching == "padded":
            bins = [units[number * size : (number + 1) * size] for number in range(count)]
        else:
            bins = self._balanced(units, count, size)
        rounds = [bins[begin : begin + world_size] for begin in range(0, count, world_size)]
        return [one if number % 2 == 0 else one[::-1] for number, one in enumerate(rounds)]

    def _balanced(self, units: list[int], count: int, size: int) -> list[list[int]]:
        """`units`, longest first, in `count` bins of at most `size`, each into the emptiest; the fullest bin first."""
        bins: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, number) for number in range(count)]
        full = []
        for unit in units:
            tokens, number = heapq.heappop(heap)
            bins[number].append(unit)
            filled = (tokens + int(self._unit_lengths[unit]), number)
            if len(bins[number]) < size:
                heapq.heappush(heap, filled)
            else:
                full.append(filled)
        return [bins[number] for _, number in sorted(heap + full, key=lambda one: (-one[0], one[1]))]


def shuffled(count: int, seed: int, epoch: int, what: str = "") -> np.ndarray:
    """0 .. count-1 in an order that depends on the arguments alone: by a 64-bit hash of each number.

    The hash is the output function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    2014), so that no version of any library changes the order under a run that is resumed.
    """
    start = seed & MASK
    for part in (epoch, *what.encode()):
        start = int(_mixed(np.array([(start + GOLDEN * (part + 1)) & MASK], dtype=np.uint64))[0])
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.array([start], dtype=np.uint64)
    return np.argsort(_mixed(keys), kind="stable")


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
