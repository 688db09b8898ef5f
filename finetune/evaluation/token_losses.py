"""Losses of a model on each answer of each conversation, at supervised positions, computed as in training.

    labels of an example          -100 -100  Yes </s>  -100 -100  No </s>
    turn of supervised tokens                 1   1                3   3
    AnswerLoss                    turn 1: 2 tokens, sum of their losses      turn 3: 2 tokens, ...

Conversations are grouped by their lengths alone, and ranks get whole groups: one rank and several compute the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from finetune.chat_templates import ChatFormat, supervised_turns_of
from finetune.dataset.collator import Collator, pad_token_id, pop_targets, to_device
from finetune.inference.load_result import BASE, TUNED, LoadedModel
from finetune.models.attention import supports_logits_to_keep
from finetune.models.loss import token_losses
from finetune.models.module_kinds import unwrap_adapter
from finetune.models.padding_free import enable_padding_free
from finetune.utils.console import is_rank_0

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class MeasuredModel:
    """One of the two models of a result, with what asking it takes."""

    name: str  # tuned or base
    model: Any
    chat_format: ChatFormat
    pad_token_id: int
    stop_token_ids: Sequence[int] = ()
    has_virtual_tokens: bool = False  # an adapter puts them before each row

    @property
    def device(self) -> Any:
        """The device for input ids; layers may be on several devices."""
        return self.model.get_input_embeddings().weight.device

    def bar(self, total: int, unit: str = " tokens", what: str = "") -> Any:
        """Return a progress bar on stderr; it shows the share of rank 0."""
        label = f"{self.name}{what}"
        return tqdm(total=total, desc=label, unit=unit, unit_scale=True, delay=2, disable=not is_rank_0())

    @contextmanager
    def padding_free(self, longest: int) -> Iterator[str | None]:
        """Switch to padding-free batches inside the block; yield why the model cannot run them, or None."""
        if self.has_virtual_tokens:
            yield "the adapter puts virtual tokens before each row"
            return
        base = unwrap_adapter(self.model)
        stock = base.config._attn_implementation
        vocab_size = base.config.get_text_config().vocab_size
        reason = enable_padding_free(self.model, longest=longest, vocab_size=vocab_size, device=self.device)
        try:
            yield reason
        finally:
            if reason is None:
                base.set_attn_implementation(stock)

    def token_losses(self, examples: list[dict[str, Any]], *, is_flat: bool = False) -> np.ndarray:
        """Return -log p of each supervised token of the examples, in order; float64 [P]."""
        selects = supports_logits_to_keep(self.model)
        collate = Collator(is_flat, self.pad_token_id, selects and not self.has_virtual_tokens)
        batch = to_device(collate(examples), self.device)
        targets = pop_targets(batch)
        if not len(targets.tokens):
            return np.zeros(0)
        if self.has_virtual_tokens and selects:
            # Positions counted from the end are the same with virtual tokens at the beginning.
            kept = batch["logits_to_keep"] = targets.positions.shape[1] - int(targets.positions.any(dim=0).nonzero()[0])
            targets = targets._replace(positions=targets.positions[:, -kept:])
        losses = token_losses(self.model, {"use_cache": self.has_virtual_tokens, **batch}, targets)
        return losses.double().cpu().numpy()


def measure_each(loaded: LoadedModel, measure: Callable[[MeasuredModel], Measured]) -> dict[str, Measured]:
    """Measure the base (unless it is left out), then the tuned model; by their names."""
    known = loaded.chat_format, pad_token_id(loaded.tokenizer), loaded.stop_token_ids
    measured = {}
    if loaded.with_base:
        with loaded.base() as base:
            measured[BASE] = measure(MeasuredModel(BASE, base, *known))
    tuned = MeasuredModel(TUNED, loaded.tuned, *known, has_virtual_tokens=loaded.result.has_virtual_tokens)
    measured[TUNED] = measure(tuned)
    return measured


@dataclass(frozen=True)
class AnswerLoss:
    """Loss of a model on one model turn of one example."""

    example: int  # index of the example in the data
    turn: int  # index of the turn in the conversation, a system turn included
    tokens: int  # number of supervised tokens, the end-of-turn token included
    loss: float  # sum of their -log p, in nats


def group_by_tokens(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group the indices of examples, longest first, up to `tokens_per_batch`; a longer one is a group of its own."""
    groups: list[list[int]] = []
    remaining = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not groups or lengths[index] > remaining:
            groups.append([])
            remaining = tokens_per_batch
        groups[-1].append(index)
        remaining -= lengths[index]
    return groups


def measure_token_losses(
    model: MeasuredModel, examples: Any, groups: Sequence[Sequence[int]], *, is_flat: bool, done: Callable[[int], None]
) -> list[AnswerLoss]:
    """Compute the losses of these groups of examples; one entry per answer.

    Args:
        examples: A `datasets.Dataset` with `input_ids`, `labels` and `turn_spans`.
        is_flat: Compute each group as one padding-free batch, else its examples one by one.
        done: Called with the number of tokens after each batch.
    """
    results: list[AnswerLoss] = []
    for batch in groups if is_flat else [[index] for group in groups for index in group]:
        columns = examples[list(batch)]
        batch_examples = [
            {"input_ids": input_ids, "labels": labels}
            for input_ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
        ]
        losses = model.token_losses(batch_examples, is_flat=is_flat)
        for index, example, spans in zip(batch, batch_examples, columns["turn_spans"], strict=True):
            answers = [span for span in spans if span["role"] in ("model", "text")]
            turns = supervised_turns_of(
                example["labels"], [span["turn"] for span in answers], [span["start"] for span in answers]
            )
            example_losses, losses = np.split(losses, [len(turns)])
            for turn in np.unique(turns):
                in_turn = turns == turn
                results.append(AnswerLoss(index, int(turn), int(in_turn.sum()), float(example_losses[in_turn].sum())))
        done(sum(len(example["input_ids"]) for example in batch_examples))
    return results
