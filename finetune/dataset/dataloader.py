"""The micro-batches of a run: their examples, and the counts that their losses are divided by."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from finetune.dataset.collator import Collator, LossCells, replace_distinct
from finetune.dataset.prepared_cache import int_column
from finetune.dataset.sampler import Sampler as RowSampler

ESTIMATE_STEPS = 20
STEPS_AHEAD = 2  # whose batches are built while a step runs


def padding_share(sampler: RowSampler) -> float:
    """Share of the positions of padded batches that is padding, 0 to 1, in the first steps."""
    tokens = positions = 0
    for step in range(min(ESTIMATE_STEPS, sampler.steps_per_epoch)):
        for number in range(sampler.micro_batches(step)):
            for rank in range(sampler.shape.world_size):
                lengths = sampler.lengths[sampler.micro_batch(0, step, rank, number)]
                tokens += int(lengths.sum())
                positions += int(lengths.max(initial=0)) * len(lengths)
    return 1 - tokens / max(positions, 1)


@dataclass(frozen=True)
class StepTotals:
    """Counts over rows without padding; `pairs` counts (query, key) pairs of causal attention."""

    rows: int
    tokens: int
    supervised_tokens: int
    pairs: int


@dataclass(frozen=True)
class BatchCounts:
    """Counts of a micro-batch: `tokens` are its own, `step` is for the whole step over all ranks.

    `denominator` divides the step's summed loss: its supervised tokens, or its conversations. No communication is
    needed, because every rank knows all rows of a step.
    """

    tokens: int
    step: StepTotals
    denominator: int


class MicroBatchDataset(Dataset):
    """Micro-batches of one rank by (epoch, micro-batch of the epoch); a pure function of the two.

    Args:
        examples: a `datasets.Dataset` with `input_ids`, `labels`, `num_supervised` and perhaps `weights`; `sampler`
            knows their lengths.
        collate: makes a batch of tensors of examples.
        rank: data-parallel rank.
        counts_conversations: the loss is a mean over conversations, not over tokens.
        is_skipped: bool [examples], examples that are in no micro-batch and no count, though they keep their position
            in the order of the data; None: none.
        sources: sources of the examples, for the loss breakdown; empty: there is none.
    """

    def __init__(
        self,
        examples: Any,
        sampler: RowSampler,
        collate: Collator,
        *,
        rank: int,
        counts_conversations: bool = False,
        is_skipped: np.ndarray | None = None,
        sources: Sequence[str] = (),
    ) -> None:
        self.all_columns = examples
        self.is_skipped = np.zeros(len(examples), dtype=bool) if is_skipped is None else is_skipped
        self.cells = LossCells(sources)
        columns = ["input_ids", "labels", *(("source", "answer_numbers") if sources else ())]
        if "weights" in examples.column_names and any(len(lists.values) for lists in examples.data["weights"].chunks):
            columns.append("weights")
        self.examples = examples.select_columns(columns).with_format("numpy")
        self.lengths, self.supervised = sampler.lengths, int_column(examples, "num_supervised")
        self.sampler, self.collate, self.rank = sampler, collate, rank
        self.counts_conversations = counts_conversations
        self._totals: tuple[tuple[int, int], StepTotals] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """The batch, with its `BatchCounts` under `counts`."""
        epoch, micro_batch_of_epoch = index
        step, micro_batch = divmod(micro_batch_of_epoch, self.sampler.shape.accumulation)
        rows = self.rows(epoch, step, micro_batch)
        examples = self._examples(rows)
        totals = self._step_totals(epoch, step)
        denominator = totals.rows if self.counts_conversations else totals.supervised_tokens
        return {
            **self.collate(examples),
            "counts": BatchCounts(int(self.lengths[rows].sum()), totals, max(denominator, 1)),
        }

    def _examples(self, rows: np.ndarray) -> list[dict[str, Any]]:
        if not len(rows):
            return []
        columns = self.examples[rows]
        names = [name for name in ("input_ids", "labels", "weights") if name in columns]
        examples = [
            dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)
        ]
        if self.cells.sources:
            for example, source, answers in zip(examples, columns["source"], columns["answer_numbers"], strict=True):
                example["cells"] = self.cells.of(source, answers)
        return examples

    def rows(self, epoch: int, step: int, micro_batch: int) -> np.ndarray:
        """Indices of the examples of a micro-batch of this rank."""
        return self._kept(self.sampler.micro_batch(epoch, step, self.rank, micro_batch))

    def _kept(self, rows: np.ndarray) -> np.ndarray:
        return rows[~self.is_skipped[rows]]

    def _step_totals(self, epoch: int, step: int) -> StepTotals:
        cached = self._totals
        if cached is None or cached[0] != (epoch, step):
            totals = self.totals(self._kept(self.sampler.step_rows(epoch, step)))
            cached = self._totals = ((epoch, step), totals)
        return cached[1]

    def describe(self, rows: np.ndarray, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
        """`source`, `row`, `id` and `text` of examples."""
        columns = self.all_columns.select_columns(["source", "row", "id", "input_ids"]).with_format(None)
        return [
            {
                "source": example["source"],
                "row": example["row"],
                "id": json.loads(example["id"]),
                "text": decode(example["input_ids"]),
            }
            for example in columns.select(rows)
        ]

    def shortest_example(self, supervised_tokens: int) -> dict[str, Any]:
        """`input_ids` and `labels`, int arrays [tokens], of the shortest example with so many supervised tokens.

        Where no example has so many, of one with most.
        """
        supervised = np.where(self.is_skipped, 0, self.supervised)
        is_candidate = supervised >= min(supervised_tokens, supervised.max())
        example = self.examples[int(np.where(is_candidate, self.lengths, self.lengths.max() + 1).argmin())]
        return {name: example[name] for name in ("input_ids", "labels")}

    def totals(self, rows: np.ndarray) -> StepTotals:
        """The counts of these rows."""
        lengths = self.lengths[rows]
        return StepTotals(
            rows=int((self.supervised[rows] > 0).sum()),
            tokens=int(lengths.sum()),
            supervised_tokens=int(self.supervised[rows].sum()),
            pairs=int((lengths * (lengths + 1) // 2).sum()),
        )


class MicroBatchDataLoader(DataLoader):
    """Loads an epoch of a rank's micro-batches; all ranks have the same number.

    It is a plain DataLoader over indices, so that accelerate's `skip_first_batches` can skip without reading. Its
    seeds are drawn from a generator of its own: how often an epoch begins does not change what dropout draws.
    """

    def __init__(self, micro_batches: MicroBatchDataset, **options: Any) -> None:
        self._indices = _EpochIndices(micro_batches.sampler.micro_batches_per_epoch)
        super().__init__(
            micro_batches, batch_sampler=self._indices, collate_fn=_single_batch, generator=torch.Generator(), **options
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iterator."""
        self._indices.set_epoch(epoch)


class _EpochIndices(Sampler):
    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(self.epoch, micro_batch)] for micro_batch in range(self.count))


def _single_batch(batches: list[dict[str, Any]]) -> dict[str, Any]:
    (batch,) = batches
    return batch


class Prefetcher:
    """Builds the next batches of an epoch in a thread, while a step runs.

    Args:
        pins: copy the tensors to pinned memory, from which a GPU reads while it computes.
    """

    def __init__(self, *, pins: bool) -> None:
        self.pins = pins
        self._batches: Iterator[dict[str, Any]] = iter(())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: deque[Future[dict[str, Any] | None]] = deque()

    def take(self, batches: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """Return the next `count` batches, fewer at the end, and begin with those of `STEPS_AHEAD` more steps."""
        self._batches = batches
        while len(self._coming) < count * (1 + STEPS_AHEAD):
            self._coming.append(self._thread.submit(self._next))
        taken = [self._coming.popleft().result() for _ in range(count)]
        return [batch for batch in taken if batch is not None]

    def end_epoch(self) -> None:
        """Drop the batches that were built ahead; return when none is being built."""
        for future in self._coming:
            future.cancel()
        wait(self._coming)
        self._coming.clear()

    def close(self) -> None:
        """End the thread and the DataLoader's workers, which ignore SIGTERM: the exit of Python would wait for them."""
        self.end_epoch()
        self._thread.shutdown()
        if isinstance(self._batches, _MultiProcessingDataLoaderIter):
            self._batches._shutdown_workers()

    def _next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        if batch is None or not self.pins:
            return batch
        return replace_distinct(batch, torch.Tensor, torch.Tensor.pin_memory)
