"""Rows -> a batch: one flat row with boundaries, or padded rows.

    two examples     tokens  5 6 7   labels  -100   6   7
                             8 9             -100   9

    flat             input_ids [1, T]     5 6 7 8 9      positions that predict something learned: 0 1 3
                     position_ids [1, T]  0 1 2 0 1      what they should predict (targets [P]):   6 7 9
                     cu_seq_lens [3]      0 3 5

    padded           input_ids [2, L]     5 6 7          attention_mask  1 1 1        targets [P]:  6 7 9
                                          8 9 p                          1 1 0

Labels are shifted inside each example, so no position ever predicts the first token of another one. What is padding is
decided by length, never by id: a pad token that equals the end-of-turn token hides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from finetune.chat_templates import IGNORE_INDEX

LossWeighting = Literal["token", "conversation"]
# What a batch carries for the loss; everything else in it is an argument of the model.
LOSS_KEYS = ("targets", "target_positions", "targets_beside", "target_cells")


class Targets(NamedTuple):
    """What a batch is compared with, as `Collator` describes it; None for what it does not carry."""

    tokens: Any
    positions: Any
    beside: Any
    cells: Any


def pop_targets(batch: dict[str, Any]) -> Targets:
    """Take the targets out of a batch, which then holds arguments of the model alone; their `positions` are None where
    the model is asked for the logits there and nowhere else."""
    targets = Targets(*(batch.pop(name, None) for name in LOSS_KEYS))
    return targets._replace(positions=None) if "logits_to_keep" in batch else targets


@dataclass(frozen=True)
class Collator:
    """Callable: examples with `input_ids` and `labels` (int arrays of equal length) -> one batch of tensors.

    Args:
        flat: one row with boundaries instead of padded rows.
        pad_token_id: fills padded rows, and stands in where there is no example at all.
        selects_logits: ask the model for the logits of `target_positions` alone.
        part: (number, of how many) of ranks that share a flat row; each gets as many of its tokens, and the targets
            that these predict, but all boundaries, because in attention it meets the whole row.
        weighting: `conversation` adds `targets_beside`, by which every example can count as much as any other.
    """

    flat: bool
    pad_token_id: int
    selects_logits: bool
    weighting: LossWeighting = "token"
    part: tuple[int, int] = (0, 1)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Without examples: one pad token that predicts nothing, so that a rank without work can keep step.

        `targets` int64 [P] are the learned tokens; `target_positions` says where they are predicted: int64 [P] indices
        into a flat row, bool [rows, L] for padded rows. `targets_beside` int64 [P]: how many targets the example of a
        target has. (Numbers, not weights: floats of a batch are cast to the precision of the run.) `target_cells` int64
        [P], where examples bring `cells`: what part of the data a target is of; see `loss_parts`.
        """
        import torch

        ids = [np.asarray(one["input_ids"], dtype=np.int64) for one in examples] or [np.array([self.pad_token_id])]
        labels = [np.asarray(one["labels"], dtype=np.int64) for one in examples] or [np.array([IGNORE_INDEX])]
        for one in labels:
            if one[0] != IGNORE_INDEX:
                raise ValueError("the first token of an example follows nothing: it cannot be learned")
        number, parts = self.part
        if (rest := -sum(map(len, ids)) % parts) > 0:
            ids, labels = [*ids, np.full(rest, self.pad_token_id)], [*labels, np.full(rest, IGNORE_INDEX)]
        batch = self._flat(ids, labels) if self.flat else self._padded(ids, labels)
        if self.weighting == "conversation":
            counts = [int((one != IGNORE_INDEX).sum()) for one in labels]
            batch["targets_beside"] = np.repeat(counts, counts)
        if examples and "cells" in examples[0]:
            batch["target_cells"] = np.concatenate([one["cells"] for one in examples])
        if parts > 1:
            batch = _part(batch, number, parts)
        if self.selects_logits:
            batch["logits_to_keep"] = batch["target_positions"]
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()
        }

    def _flat(self, ids: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Any]:
        lengths = [len(one) for one in ids]
        joined = np.concatenate(labels)
        learned = np.flatnonzero(joined != IGNORE_INDEX)
        boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return {
            "input_ids": np.concatenate(ids)[None],
            "position_ids": np.concatenate([np.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
            "segment_lengths": lengths,
            "use_cache": False,
            "target_positions": learned - 1,
            "targets": joined[learned],
        }

    def _padded(self, ids: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Any]:
        shape = (len(ids), max(map(len, ids)))
        tokens = np.full(shape, self.pad_token_id)
        mask = np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX)
        for row, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
            tokens[row, : len(row_ids)], mask[row, : len(row_ids)] = row_ids, 1
            targets[row, : len(row_ids) - 1] = row_labels[1:]
        predicts = targets != IGNORE_INDEX
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "target_positions": predicts,
            "targets": targets[predicts],
        }


def _part(batch: dict[str, Any], number: int, parts: int) -> dict[str, Any]:
    """The tokens of one of `parts` ranks that share a flat row, and the targets that these predict."""
    size = batch["input_ids"].shape[1] // parts
    begin, positions = number * size, batch["target_positions"]
    mine = (positions >= begin) & (positions < begin + size)
    tokens = {name: batch[name][:, begin : begin + size] for name in ("input_ids", "position_ids")}
    targets = {name: batch[name][mine] for name in LOSS_KEYS if name in batch}
    return {**batch, **tokens, **targets, "target_positions": targets["target_positions"] - begin}


def pad_token_id(tokenizer: Any) -> int:
    """The tokenizer's pad id, else its end token's, else 0: masked by length, so any id will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0
