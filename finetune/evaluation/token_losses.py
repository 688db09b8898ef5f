"""What a model loses on each answer of each conversation: at learned positions, as training computes it.

    labels of an example     -100 -100  Yes </s>  -100 -100  No </s>
    turn of each learned                 1   1                3   3
    AnswerLoss                   turn 1: 2 tokens, their losses summed      turn 3: 2 tokens, ...

Which conversations are computed together depends on their lengths alone, and whole groups go to ranks: the losses of
one rank and of several are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.chat_templates import supervised_turns_of


@dataclass(frozen=True)
class AnswerLoss:
    """What a model loses on one model turn of one example.

    Attributes:
        example: its number in the order of the data.
        turn: its number in the conversation, counted from 0, a system turn with the others.
        tokens: that are learned, the end of the turn among them.
        loss: their sum of -log p, in nats.
    """

    example: int
    turn: int
    tokens: int
    loss: float


def groups_of(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Numbers of examples, the longest first, in groups of up to so many tokens; a longer one stands alone."""
    groups: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        if not groups or lengths[number] > room:
            groups.append([])
            room = tokens_per_batch
        groups[-1].append(number)
        room -= lengths[number]
    return groups


@contextmanager
def flat_rows(model: Any, *, longest: int, has_virtual_tokens: bool) -> Iterator[str | None]:
    """Inside the block the model runs flat rows; yields why it cannot, or None. Afterwards it is as it was."""
    from finetune.models.attention import enable_padding_free

    if has_virtual_tokens:
        yield "virtual tokens stand in front of each row"
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stock = base.config._attn_implementation
    vocab_size = base.config.get_text_config().vocab_size
    reason = enable_padding_free(model, longest=longest, vocab_size=vocab_size, device=device_of(model))
    try:
        yield reason
    finally:
        if reason is None:
            base.set_attn_implementation(stock)


def device_of(model: Any) -> Any:
    """Where a model takes its ids, though its layers may lie on several devices."""
    return model.get_input_embeddings().weight.device


def measure_token_losses(
    model: Any,
    examples: Any,
    groups: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    is_flat: bool,
    has_virtual_tokens: bool = False,
    done: Callable[[int], None] = lambda tokens: None,
) -> list[AnswerLoss]:
    """The losses of these groups of examples, an entry for each answer.

    Args:
        examples: a `datasets.Dataset` with `input_ids`, `labels` and `turn_spans`.
        is_flat: a group is one flat row; else its examples are run one by one.
        done: is told the tokens of each batch.
    """
    found: list[AnswerLoss] = []
    for group in groups:
        rows = examples[list(group)]
        for batch in [range(len(group))] if is_flat else [[number] for number in range(len(group))]:
            chosen = [{name: rows[name][number] for name in ("input_ids", "labels")} for number in batch]
            losses = token_losses_of(model, chosen, pad_token_id, is_flat, has_virtual_tokens)
            begin = 0
            for number, example in zip(batch, chosen, strict=True):
                answers = [span for span in rows["turn_spans"][number] if span["role"] == "model"]
                places = ([span[name] for span in answers] for name in ("turn", "start"))
                turns = supervised_turns_of(example["labels"], *places)
                own = losses[begin : begin + len(turns)]
                begin += len(turns)
                found += [
                    AnswerLoss(group[number], int(turn), int((turns == turn).sum()), float(own[turns == turn].sum()))
                    for turn in np.unique(turns)
                ]
            done(sum(len(example["input_ids"]) for example in chosen))
    return found


def token_losses_of(
    model: Any, examples: list[dict[str, Any]], pad_token_id: int, is_flat: bool, has_virtual_tokens: bool
) -> np.ndarray:
    """float64 [P]: -log p of each learned token of the examples, in order."""
    import torch

    from finetune.dataset.collator import LOSS_KEYS, Collator
    from finetune.models.attention import supports_logits_to_keep
    from finetune.training.loss import token_losses

    selects = supports_logits_to_keep(model) and not has_virtual_tokens
    device = device_of(model)
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in Collator(is_flat, pad_token_id, selects)(examples).items()
    }
    targets, positions = batch["targets"], batch["target_positions"]
    if not len(targets):
        return np.zeros(0)
    arguments = {name: value for name, value in batch.items() if name not in LOSS_KEYS}
    if has_virtual_tokens and supports_logits_to_keep(model):
        # Counted from the end, positions are the same with virtual tokens in front.
        arguments["logits_to_keep"] = positions.shape[1] - int(positions[0].nonzero()[0])
        positions = positions[:, -arguments["logits_to_keep"] :]
    with torch.no_grad():
        logits = model(**{"use_cache": has_virtual_tokens, **arguments}).logits
    if not selects:
        logits = logits[0, positions] if is_flat else logits[:, -positions.shape[1] :][positions]
    logits = logits.reshape(-1, logits.shape[-1])
    return token_losses(logits, targets.to(logits.device)).double().cpu().numpy()
