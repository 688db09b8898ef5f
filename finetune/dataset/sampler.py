"""(seed, epoch, optimizer step, rank, micro-batch) -> row ids; integers only.

The rows of a step depend on its size alone, not on how it is divided: 1 rank x 8 rows, 2 ranks x 4 rows and 2 x 2 rows
accumulated twice see the same rows in every step. Each row comes once per epoch; the last step may be short, and no row
is repeated to fill it. A rank that has nothing left gets an empty micro-batch. Within a step, the load is balanced over
the ranks of a micro-batch.

Everything is a pure function of its arguments: the step is the whole state, and to resume is to start at another step.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune.dataset.packing import Groups, best_fit_decreasing, rectangles

Batching = Literal["flat", "padded", "packed"]
Order = Literal["random", "sequential", "group_by_length"]

# A token budget is filled from the rows of this many batches in random order: enough to fill them well, few enough that
# long and short rows stay mixed.
BATCHES_FILLED_TOGETHER = 32
STEPS_GROUPED_TOGETHER = 50
# From so many micro-batches on, a quarter of them get their next unit at once: 16,384 units are dealt in 4 ms
# instead of 25 ms, and the fullest micro-batch has 0.1 % more tokens.
MICRO_BATCHES_DEALT_ONE_BY_ONE = 32
NO_UNIT = -1
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class BatchShape:
    """How a step is divided; `per_device_batch` counts rows, or groups of rows if there is a token capacity."""

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
    """Decides which rows a micro-batch holds.

    Args:
        lengths: tokens of each row, int array [rows].
        shape: how a step is divided.
        batching: `padded` micro-batches of a step get rows of similar length each; for the others the sums of the
            lengths are balanced.
        capacity: tokens of a group of rows, which stays together as one unit; None if each row is a unit.
        order: order of an epoch. `group_by_length` puts rows of similar length into the same step.
        drop_last: drop the last step of an epoch if it is short.

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
        self.groups = None if capacity is None else self._pack(capacity)
        self._unit_lengths = self.lengths if self.groups is None else self.groups.sums(self.lengths)
        self._epoch: tuple[int, np.ndarray] | None = None
        self._step: tuple[tuple[int, int], np.ndarray] | None = None

    def _pack(self, capacity: int) -> Groups:
        """Groups of at most `capacity` tokens; their order differs between epochs, their rows do not."""
        rows = self._ordered(len(self.lengths), 0, "rows")
        windows = [rows]
        if self.batching != "packed":  # packed rows are as full as possible: one window of all rows
            filled = np.cumsum(self.lengths[rows]) // (capacity * BATCHES_FILLED_TOGETHER)
            windows = np.split(rows, np.flatnonzero(np.diff(filled)) + 1)
        fill = rectangles if self.batching == "padded" else best_fit_decreasing
        return Groups.pack(self.lengths, capacity, fill, windows)

    @property
    def num_units(self) -> int:
        """Rows, or groups of rows if there is a capacity."""
        return len(self._unit_lengths)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        full, remainder = divmod(self.num_units, self.shape.step_size)
        return full + (remainder > 0 and not self.drop_last)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of each rank in an epoch; the last step may have fewer than the others."""
        steps = self.steps_per_epoch
        return (steps - 1) * self.shape.accumulation + self.micro_batches(steps - 1) if steps else 0

    def micro_batches(self, step: int) -> int:
        """Micro-batches of each rank in this step of an epoch."""
        remaining = self.num_units - step * self.shape.step_size
        return -(-min(self.shape.step_size, remaining) // self.shape.micro_batch_size)

    def position(self, global_step: int) -> tuple[int, int]:
        """(epoch, step of that epoch) of a step counted over the whole run."""
        return divmod(global_step, self.steps_per_epoch)

    def micro_batch(self, epoch: int, step: int, rank: int, micro_batch: int) -> np.ndarray:
        """Row ids, int64; none if nothing is left for this rank."""
        divided = self._step  # another thread may replace it
        if divided is None or divided[0] != (epoch, step):
            divided = self._step = ((epoch, step), self._divide(epoch, step))
        units = divided[1][micro_batch, rank]
        return self._rows(units[units != NO_UNIT])

    def step_rows(self, epoch: int, step: int) -> np.ndarray:
        """Row ids of a whole step, int64, over all ranks and micro-batches."""
        return self._rows(self._units(epoch, step))

    def _rows(self, units: np.ndarray) -> np.ndarray:
        return units if self.groups is None else self.groups.rows_of(units)

    def _units(self, epoch: int, step: int) -> np.ndarray:
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch}")
        ordered = self._epoch
        if ordered is None or ordered[0] != epoch:
            ordered = self._epoch = (epoch, self._epoch_order(epoch))
        return ordered[1][step * self.shape.step_size : (step + 1) * self.shape.step_size]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        units = self._ordered(self.num_units, epoch, "units")
        if self.order != "group_by_length":
            return units
        size = self.shape.step_size
        num_full = len(units) // size * size  # units in full steps
        window_size = size * STEPS_GROUPED_TOGETHER
        windows = np.split(units[:num_full], range(window_size, num_full, window_size))
        by_length = np.concatenate([self._longest_first(window) for window in windows])
        steps = by_length.reshape(-1, size)[self._ordered(num_full // size, epoch, "steps")]
        return np.concatenate([steps.ravel(), units[num_full:]])

    def _longest_first(self, units: np.ndarray) -> np.ndarray:
        return units[np.argsort(-self._unit_lengths[units], kind="stable")]

    def _ordered(self, count: int, epoch: int, what: str) -> np.ndarray:
        return np.arange(count) if self.order == "sequential" else shuffled(count, self.seed, epoch, what)

    def _divide(self, epoch: int, step: int) -> np.ndarray:
        """Units, or `NO_UNIT`, int64 [micro-batches, ranks, units of a rank].

        Every other micro-batch is in reverse, so that no rank always has the most.
        """
        units = self._longest_first(self._units(epoch, step))
        world_size, size = self.shape.world_size, self.shape.per_device_batch
        count = self.micro_batches(step) * world_size
        if self.batching == "padded":
            divided = np.full(count * size, NO_UNIT, dtype=np.int64)
            divided[: len(units)] = units
        else:
            divided = self._balanced(units, count, size)
        micro_batches = divided.reshape(-1, world_size, size)
        micro_batches[1::2] = micro_batches[1::2, ::-1].copy()
        return micro_batches

    def _balanced(self, units: np.ndarray, count: int, size: int) -> np.ndarray:
        """`count` bins of at most `size` units, each unit put into the emptiest; the fullest bin first."""
        bins = np.full((count, size), NO_UNIT, dtype=np.int64)
        held, tokens = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        at_once = 1 if count < MICRO_BATCHES_DEALT_ONE_BY_ONE else count // 4
        begin = 0
        while begin < len(units):
            with_room = np.flatnonzero(held < size)
            taken = min(at_once if begin else count, len(with_room), len(units) - begin)
            emptiest = with_room[np.argsort(tokens[with_room], kind="stable")[:taken]]
            dealt = units[begin : begin + taken]
            bins[emptiest, held[emptiest]] = dealt
            held[emptiest] += 1
            tokens[emptiest] += self._unit_lengths[dealt]
            begin += taken
        return bins[np.argsort(-tokens, kind="stable")]


def shuffled(count: int, seed: int, epoch: int, what: str = "") -> np.ndarray:
    """A permutation of 0 .. count-1, sorted by a 64-bit hash of each number.

    The hash is the output function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
    2014), so that no library version changes the order of a resumed run.
    """
    start = seed & MASK
    for part in (epoch, *what.encode()):
        start = int(_splitmix64(np.array([(start + GOLDEN * (part + 1)) & MASK], dtype=np.uint64))[0])
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.array([start], dtype=np.uint64)
    return np.argsort(_splitmix64(keys), kind="stable")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
