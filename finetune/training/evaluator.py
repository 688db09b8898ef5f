"""Held-out loss during training: padding-free like training, a mean over all supervised tokens on any ranks."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback

from finetune.dataset.collator import pop_targets
from finetune.dataset.dataloader import MicroBatchDataLoader, MicroBatchDataset
from finetune.distributed import watchdog
from finetune.models.loss import token_losses
from finetune.training.loss_breakdown import LossBreakdown
from finetune.utils.console import is_rank_0, is_terminal

logger = logging.getLogger(__name__)

LOSS, BATCHES_LOST = "eval_loss", "eval_non_finite_batches"


class HeldOutEvaluator:
    """Evaluate held-out conversations: `batches` of this rank, every rank has as many, some may be empty."""

    def __init__(self, batches: MicroBatchDataset, device: Any) -> None:
        self.batches = batches
        self.parts = LossBreakdown(batches.cells.sources, device, prefix="eval_")
        self._lost = torch.zeros((), dtype=torch.int64, device=device)

    def loss(self, model: Any, prepare: Any, step: int) -> dict[str, float]:
        """Return the mean loss over all supervised tokens of all ranks; `parts` has it by source and turn. All ranks.

        A non-finite loss makes the mean non-finite, and its micro-batch is counted. `prepare` moves a batch to the
        device; the model is in training mode again afterwards.
        """
        began, total = time.perf_counter(), self.batches.sampler.micro_batches_per_epoch
        model.eval()
        bar = tqdm(
            total=total, desc="evaluating", unit=" batches", leave=False, disable=not (is_rank_0() and is_terminal())
        )
        with torch.no_grad(), bar:
            for batch in MicroBatchDataLoader(self.batches):
                watchdog.report_phase("evaluation", step)
                self._add(model, prepare(batch))
                bar.update()
        model.train()
        counts = self._lost.clone()
        if dist.is_initialized():
            dist.all_reduce(counts)
        self._lost.zero_()
        sums, tokens = (sum(values) for values in self.parts.total())
        self.parts.take()
        lost = int(counts)
        mean = sums / tokens if tokens and not lost else math.nan
        return {LOSS: mean, "eval_tokens": int(tokens), BATCHES_LOST: lost, "eval_seconds": time.perf_counter() - began}

    def _add(self, model: Any, batch: dict[str, Any]) -> None:
        batch.pop("counts")
        targets = pop_targets(batch)
        losses = token_losses(model, batch, targets)
        if targets.cells is None:  # a rank without data still takes part in collectives
            return
        self.parts.add(targets.cells, losses)
        self._lost += ~torch.isfinite(losses).all()


class EarlyStopping(TrainerCallback):
    """Stop training when so many evaluations in a row have not improved on the best before them.

    It reads the log history, which checkpoints keep, so a resumed run stops at the same step. A loss counts as better
    if it is lower by `threshold`.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by every rank, with the same numbers."""
        losses = [entry[LOSS] for entry in state.log_history if LOSS in entry]
        since = without_progress(losses, self.threshold)
        if since >= self.patience:
            control.should_training_stop = True
            logger.info(f"stopping early: the held-out loss has not been lower for {since} evaluations")


def without_progress(losses: Sequence[float | None], threshold: float) -> int:
    """Count the last losses that were not lower than the best before them; a non-finite one never is.

    >>> without_progress([2.0, 1.5, 1.6, None], 0.0)
    2
    """
    best, since = math.inf, 0
    for loss in losses:
        if loss is not None and math.isfinite(loss) and loss < best - threshold:
            best, since = loss, 0
        else:
            since += 1
    return since


def best_checkpoint(history: Sequence[dict[str, Any]], steps: Sequence[int]) -> tuple[int, float] | None:
    """Return the saved step with the lowest held-out loss in the log history, and that loss; None: none is there."""
    evaluated = [
        (entry[LOSS], entry["step"])
        for entry in history
        if entry.get(LOSS) is not None and math.isfinite(entry[LOSS]) and entry["step"] in set(steps)
    ]
    return (min(evaluated)[1], min(evaluated)[0]) if evaluated else None
