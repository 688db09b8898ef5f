"""Build this rank's micro-batches: padding-free where the model can, packed or padded where it must."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.config.hardware import Precision
from finetune.config.run_config import BatchConfig
from finetune.dataset.collator import Collator, LossWeighting, pad_token_id
from finetune.dataset.prepare import ExampleSet, PreparedData
from finetune.dataset.prepared_cache import int_column
from finetune.dataset.sampler import Batching, BatchShape, Order, Sampler
from finetune.distributed.collectives import get_rank
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from finetune.dataset.dataloader import MicroBatchDataset

NO_LOGITS_TO_KEEP = "this model's code has no logits_to_keep"


@dataclass(frozen=True)
class BatchLayout:
    """How micro-batches are made; `capacity` is the tokens of a packed group of rows, or None."""

    batching: Batching
    selects_logits: bool
    capacity: int | None
    order: Order
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataloaders:
    """Micro-batches of this rank, those of the held-out conversations or None, and the layout that both have."""

    train: MicroBatchDataset
    held_out: MicroBatchDataset | None
    layout: BatchLayout


def build_dataloaders(
    batch: BatchConfig,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    device: torch.device,
    zero_stage: int | None,
    precision: Precision = "float32",
) -> Dataloaders:
    """Build the micro-batches of this rank, as requested or as this model can take them. All ranks.

    Args:
        precision: the run computes in; without DeepSpeed autocast does.

    Raises:
        ConfigError: nothing would be trained: no parameter, no row, no full step; or ranks are to share conversations
            and this model cannot.
    """
    from finetune.dataset.dataloader import MicroBatchDataset
    from finetune.models.adapters import count_parameters
    from finetune.models.attention import supports_logits_to_keep
    from finetune.models.loss_head import enable_loss_head
    from finetune.models.module_kinds import unwrap_adapter
    from finetune.models.padding_free import check_causal
    from finetune.models.segments import by_segment_note

    if not count_parameters(model)[0]:
        raise ConfigError("no parameter of this model would be trained")
    epoch, held_out = data.epoch(batch.seed), data.held_out(batch.seed)
    lengths = int_column(epoch.examples, "length")
    if zero_stage is None or zero_stage < 3:
        model.to(device)
    autocast: Precision = precision if zero_stage is None else "float32"
    size = _vocab_size(model)
    check_causal(model, vocab_size=size, device=device, autocast=autocast)
    reason = _padding_reason(batch, model, data.longest, device, autocast)
    collator = Collator(
        flat=batch.batching != "padded" and not reason,
        pad_token_id=pad_token_id(tokenizer),
        selects_logits=supports_logits_to_keep(model) and not batch.full_logits_reason,
        weighting=batch.loss_weighting,
    )
    no_head = enable_loss_head(model, collator, vocab_size=size, device=device, autocast=autocast)
    full = None if no_head is None or collator.selects_logits else batch.full_logits_reason or NO_LOGITS_TO_KEEP
    layout = decide_layout(batch, int(lengths.max()), reason, full)
    base = unwrap_adapter(model)
    by_segment = by_segment_note(base)
    notes = (
        neighbours_note(batch, base, data.longest),
        by_segment and f"{layout.batching} batches: {by_segment}",
        no_head and f"a micro-batch's logits are held in memory, because the head cannot compute the loss: {no_head}",
    )
    layout = replace(layout, notes=(*layout.notes, *(note for note in notes if note)))
    data_rank, part = divmod(get_rank(), batch.sequence_parallel_size)
    collator = replace(collator, part=(part, batch.sequence_parallel_size))

    def micro_batches(rows: ExampleSet, sampler: Sampler, weighting: LossWeighting) -> MicroBatchDataset:
        return MicroBatchDataset(
            rows.examples,
            sampler,
            collator,
            rank=data_rank,
            counts_conversations=weighting == "conversation",
            is_skipped=rows.is_skipped,
            sources=rows.sources,
        )

    sampler = train_sampler(batch, layout, lengths)
    _check_steps(sampler, epoch.is_skipped)
    train = micro_batches(epoch, sampler, batch.loss_weighting)
    if held_out is None:
        return Dataloaders(train, None, layout)
    sampler = evaluation_sampler(batch, layout, int_column(held_out.examples, "length"))
    return Dataloaders(train, micro_batches(held_out, sampler, "token"), layout)


def neighbours_note(batch: BatchConfig, base: Any, longest: int) -> str | None:
    """Say that conversations in a padded batch that was asked for change each other's losses, if they do."""
    from finetune.models.segments import LONGEST_DECIDES, rows_decide_rope

    shares = batch.tokens_per_device or max(batch.per_device_batch, batch.per_device_eval_batch) > 1
    if batch.batching != "padded" or not shares or not rows_decide_rope(base, longest):
        return None
    return f"padded batches: {LONGEST_DECIDES}, so that a loss depends on the rows beside it; --batching flat does not"


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _padding_reason(
    batch: BatchConfig, model: Any, longest: int, device: torch.device, autocast: Precision
) -> str | None:
    """Switch the model to padding-free attention where it is wanted; why it cannot, or None. All ranks."""
    from finetune.models.padding_free import enable_padding_free

    reason = batch.padding_reason
    if batch.batching != "padded" and not reason:
        reason = enable_padding_free(
            model,
            longest=longest,
            vocab_size=_vocab_size(model),
            device=device,
            autocast=autocast,
            shared=batch.sequence_parallel_size > 1,
        )
    if reason and batch.sequence_parallel_size > 1:
        raise ConfigError(
            f"--sequence_parallel_size {batch.sequence_parallel_size}: ranks can only share padding-free rows, and "
            + reason
        )
    return reason


def decide_layout(
    batch: BatchConfig, longest: int, padding_reason: str | None, full_logits_because: str | None = None
) -> BatchLayout:
    """Decide how micro-batches are laid out, with a note for each deviation from what was asked.

    Args:
        longest: tokens of the longest example.
        padding_reason: why rows must be padded, or None.
        full_logits_because: why logits must be computed at all positions, or None.
    """
    wanted, capacity, notes = batch.batching, batch.tokens_per_device, []
    if capacity is not None and capacity < longest:
        raise ConfigError(
            f"--tokens_per_device_batch {capacity:,}: the longest example has {longest:,} tokens: give at least as "
            "many, or a smaller --model_max_length"
        )
    batching: Batching = "padded" if padding_reason else wanted
    if padding_reason and wanted != "padded":
        notes.append(f"--batching {wanted}: fallback to padded because {padding_reason}")
    if full_logits_because:
        notes.append(f"logits are computed at all positions, not only at supervised ones: {full_logits_because}")
    if wanted == "packed":  # the fallback has as many tokens per batch
        capacity = batch.model_max_length * (1 if batching == "packed" else batch.per_device_batch)
    order: Order = "sequential" if batch.sampling == "sequential" else "random"
    if batch.sampling == "group_by_length":
        order = "group_by_length" if batching == "padded" else "random"
        if batching != "padded":
            notes.append(f"group_by_length is off: {batching} batches have no padding that it could save")
    return BatchLayout(batching, full_logits_because is None, capacity, order, tuple(notes))


def train_sampler(batch: BatchConfig, layout: BatchLayout, lengths: np.ndarray) -> Sampler:
    """Build the sampler: which rows are in which micro-batch, for examples of these lengths int64 [rows]."""
    grouped_instead = batch.batching == "packed" and layout.batching == "padded"
    return Sampler(
        lengths,
        BatchShape(
            per_device_batch=1 if grouped_instead else batch.per_device_batch,
            accumulation=batch.accumulation,
            world_size=batch.data_ranks,
        ),
        seed=batch.data_seed,
        batching=layout.batching,
        capacity=layout.capacity,
        order=layout.order,
        drop_last=batch.drop_last,
    )


def evaluation_sampler(batch: BatchConfig, layout: BatchLayout, lengths: np.ndarray) -> Sampler:
    """Build the sampler of held-out examples: in the order of the data."""
    shape = BatchShape(batch.per_device_eval_batch, 1, batch.data_ranks)
    batching: Batching = "padded" if layout.batching == "padded" else "flat"
    return Sampler(lengths, shape, seed=0, batching=batching, order="sequential")


def _check_steps(sampler: Sampler, skipped: np.ndarray) -> None:
    if not sampler.steps_per_epoch:
        raise ConfigError(
            f"--dataloader_drop_last True: {sampler.num_units} examples or groups do not fill one step of "
            f"{sampler.shape.step_size}: no step would be made"
        )
    if skipped.all():
        raise ConfigError("--skip_rows: skips every row of the data: nothing can be trained")
