"""Collate examples to a batch: one padding-free (flat) row with boundaries, or padded rows.

    two examples     tokens  5 6 7   labels  -100   6   7
                             8 9             -100   9

    flat             input_ids [1, T]     5 6 7 8 9      positions that predict a supervised token: 0 1 3
                     position_ids [1, T]  0 1 2 0 1      their targets [P]: 6 7 9
                     cu_seq_lens [3]      0 3 5

    padded           input_ids [2, L]     5 6 7          attention_mask  1 1 1        targets [P]:  6 7 9
                                          8 9 p                          1 1 0

Labels are shifted inside each example, so no position predicts the first token of another example. Padding is masked by
length, never by id: a pad token that equals the end-of-turn token masks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from finetune.chat_templates import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossWeighting = Literal["token", "conversation"]
# Entries of a batch for the loss; all others are arguments of the model.
LOSS_KEYS = ("targets", "target_positions", "targets_per_example", "target_weights", "target_cells")


class Targets(NamedTuple):
    """The targets of a batch, described at `Collator.__call__`; None for those that it does not have."""

    tokens: Any
    positions: Any
    per_example: Any
    weights: Any
    cells: Any

    def loss_weights(self) -> Any:
        """What the loss of each target is multiplied by, float32 [P]; None: 1 each."""
        if self.per_example is None:
            return self.weights
        return (1 if self.weights is None else self.weights) / self.per_example


def pop_targets(batch: dict[str, Any]) -> Targets:
    """Remove the targets from a batch, which then holds only arguments of the model.

    `positions` is None if the model computes logits at these positions only.
    """
    targets = Targets(*(batch.pop(name, None) for name in LOSS_KEYS))
    return targets._replace(positions=None) if "logits_to_keep" in batch else targets


def replace_distinct(batch: dict[str, Any], kind: type, convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Convert the entries of a type; entries that are the same object before are the same object after."""
    converted = {id(value): convert(value) for value in batch.values() if isinstance(value, kind)}
    return {name: converted.get(id(value), value) for name, value in batch.items()}


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """Return a batch on a device: one copy of each distinct tensor, which the host does not wait for."""
    import torch

    return replace_distinct(batch, torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True)
class Collator:
    """Callable: examples with `input_ids` and `labels` (int arrays of equal length) -> one batch of tensors.

    Args:
        flat: one row with boundaries instead of padded rows.
        pad_token_id: fills padded rows, and the batch of a rank without examples.
        selects_logits: ask the model for the logits at `target_positions` only.
        weighting: `conversation` adds `targets_per_example`, by which all examples can have the same weight.
        part: (index, count) of the ranks that share a flat row (sequence parallelism). Each gets an equal share of the
            tokens and the targets that these predict, but all boundaries, because its attention sees the whole row.
    """

    flat: bool
    pad_token_id: int
    selects_logits: bool
    weighting: LossWeighting = "token"
    part: tuple[int, int] = (0, 1)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate; without examples, one pad token that predicts nothing, so that the rank takes part in the step.

        `targets` int64 [P] are the supervised tokens; `target_positions` are where they are predicted: int64 [P]
        indices into a flat row, bool [rows, L] for padded rows. `targets_per_example` int64 [P] is the number of
        targets in the example of a target. `target_weights` float32 [P], if an example has `weights`, are those of
        the targets. `target_cells` int64 [P], if examples have `cells`, are cells of the loss breakdown.
        """
        import torch

        ids, labels = (
            [np.asarray(example[name], dtype=np.int64) for example in examples] or [np.array([empty])]
            for name, empty in (("input_ids", self.pad_token_id), ("labels", IGNORE_INDEX))
        )
        if any(example_labels[0] != IGNORE_INDEX for example_labels in labels):
            raise ValueError("nothing predicts the first token of an example: it cannot be supervised")
        part, parts = self.part
        if (missing := -sum(map(len, ids)) % parts) > 0:
            ids, labels = [*ids, np.full(missing, self.pad_token_id)], [*labels, np.full(missing, IGNORE_INDEX)]
        batch = self._flat(ids, labels) if self.flat else self._padded(ids, labels)
        if self.weighting == "conversation":
            counts = [int((example_labels != IGNORE_INDEX).sum()) for example_labels in labels]
            batch["targets_per_example"] = np.repeat(counts, counts)
        if any(len(example.get("weights", ())) for example in examples):
            batch["target_weights"] = np.concatenate([_weights(example) for example in examples])
        if examples and "cells" in examples[0]:
            batch["target_cells"] = np.concatenate([example["cells"] for example in examples])
        if parts > 1:
            batch = _part(batch, part, parts)
        if self.selects_logits:
            batch["logits_to_keep"] = batch["target_positions"]
        return replace_distinct(batch, np.ndarray, torch.from_numpy)

    def _flat(self, ids: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Any]:
        lengths = [*map(len, ids)]
        joined = np.concatenate(labels)
        supervised = np.flatnonzero(joined != IGNORE_INDEX)
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
            "target_positions": supervised - 1,
            "targets": joined[supervised],
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
        return {"input_ids": tokens, "attention_mask": mask, "target_positions": predicts, "targets": targets[predicts]}


def _weights(example: dict[str, Any]) -> np.ndarray:
    given = example.get("weights", ())
    if not len(given):
        given = np.ones(np.count_nonzero(np.asarray(example["labels"]) != IGNORE_INDEX))
    return np.asarray(given, dtype=np.float32)


def _part(batch: dict[str, Any], part: int, parts: int) -> dict[str, Any]:
    """The tokens of rank `part` of `parts` that share a flat row, and the targets that these predict."""
    size = batch["input_ids"].shape[1] // parts
    begin, positions = part * size, batch["target_positions"]
    is_in_part = (positions >= begin) & (positions < begin + size)
    tokens = {name: batch[name][:, begin : begin + size] for name in ("input_ids", "position_ids")}
    targets = {name: batch[name][is_in_part] for name in LOSS_KEYS if name in batch}
    return {**batch, **tokens, **targets, "target_positions": targets["target_positions"] - begin}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad id, else its end token, else 0; padding is masked by length, so any id will do."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


# ---- the loss breakdown: a cell is source index x `MAX_ANSWERS` + answer number

MAX_ANSWERS = 16  # the last one stands for all later ones, too
MAX_SOURCES = 32


class LossCells:
    """Numbers the cells of the supervised tokens; more than `MAX_SOURCES` sources are counted as one."""

    def __init__(self, sources: Sequence[str]) -> None:
        is_separate = len(sources) <= MAX_SOURCES
        self.sources = tuple(sources) if is_separate else ("all",)
        self._index = {name: index if is_separate else 0 for index, name in enumerate(sources)}

    def of(self, source: str, answer_numbers: np.ndarray) -> np.ndarray:
        """Cells of an example's supervised tokens, int64 [supervised]; `answer_numbers` ints [supervised]."""
        return self._index[source] * MAX_ANSWERS + answer_numbers.astype(np.int64)
