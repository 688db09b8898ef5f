"""Mean losses by source of the data and by model turn of a conversation.

Every supervised token has a cell, numbered on the host: its source x its model turn. Losses are summed by cell on the
device, without a sync, and over all ranks when a step is logged.

    conversation   human  model  human  model        answers     1   1   2   2
                          y y e         z e          cells of    source 0: 0 0 0 1 1
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from finetune.dataset.collator import MAX_ANSWERS


class LossBreakdown:
    """Sum losses by cell, float64 on the device; `logged` has the means of the last line, their names with `prefix`."""

    def __init__(self, sources: Sequence[str], device: Any, prefix: str = "") -> None:
        self.sources, self.prefix = tuple(sources), prefix
        self.logged: dict[str, dict[str, float]] = {}
        self._sums = torch.zeros(2, len(self.sources) * MAX_ANSWERS, dtype=torch.float64, device=device)

    def add(self, cells: Any, losses: Any) -> None:
        """Add one micro-batch: cells int64 [P], losses [P]; non-finite ones are skipped."""
        counted = torch.isfinite(losses)
        values = torch.stack([torch.where(counted, losses, 0).double(), counted.double()])
        self._sums.index_add_(1, cells, values)

    def total(self) -> list[list[float]]:
        """Return sums and counts by cell over all ranks. All ranks."""
        sums = self._sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums.tolist()

    def take(self) -> None:
        """Move the means into `logged` and restart the sums. All ranks."""
        sums, counts = (np.array(values).reshape(-1, MAX_ANSWERS) for values in self.total())
        by_source = _means(self.sources, sums.sum(1), counts.sum(1))
        by_answer = _means([*map(str, range(1, MAX_ANSWERS)), f"{MAX_ANSWERS}+"], sums.sum(0), counts.sum(0))
        self.logged = {}
        if by_source and len(self.sources) > 1:  # a single source, or turn, is the loss itself
            self.logged[f"{self.prefix}loss_by_source"] = by_source
        if len(by_answer) > 1:
            self.logged[f"{self.prefix}loss_by_turn"] = by_answer
        self._sums.zero_()

    def restore(self, total: Sequence[Sequence[float]], *, is_first: bool) -> None:
        """Restore the sums of all ranks from a checkpoint, on one of them."""
        if is_first and total:
            self._sums += torch.tensor(total, dtype=torch.float64, device=self._sums.device)


def _means(names: Sequence[str], sums: Any, counts: Any) -> dict[str, float]:
    return {
        name: round(float(total / count), 6) for name, total, count in zip(names, sums, counts, strict=True) if count
    }
