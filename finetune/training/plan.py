"""Build the plan of a run, shown before the first step and written to run.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.dataset.prepare import PreparedData
from finetune.distributed.startup_timer import start_up_seconds
from finetune.run_dir.training_plan import TrainingPlan
from finetune.training.dataloaders import Dataloaders


def summarize_plan(
    settings: Mapping[str, Any], model: Any, data: PreparedData, loaders: Dataloaders, *, chat_format: str, steps: int
) -> TrainingPlan:
    """Build the plan once the number of steps is known.

    Args:
        settings: of the run, `RunConfig.plan_settings()`.
        chat_format: name of the chat template that rendered the data.
        steps: optimizer steps of the run.
    """
    from finetune.dataset.dataloader import padding_share
    from finetune.models.adapters import count_parameters

    trainable, parameters = count_parameters(model)
    sampler, collator = loaders.train.sampler, loaders.train.collate
    held_out = None
    if loaders.held_out is not None:
        held_out = (
            f"{len(loaders.held_out):,} examples, {int(loaders.held_out.lengths.sum()):,} tokens, evaluated "
            f"{settings['held_out_schedule']}"
        )
    known = {name: value for name, value in settings.items() if name != "held_out_schedule"}
    return TrainingPlan(
        **known,
        parameters=parameters,
        trainable=trainable,
        per_device_batch=sampler.shape.per_device_batch,
        accumulation=sampler.shape.accumulation,
        data_ranks=sampler.shape.world_size,
        examples=len(loaders.train),
        groups=None if sampler.capacity is None else sampler.num_units,
        group_tokens=sampler.capacity,
        tokens=int(sampler.lengths.sum()),
        supervised_share=data.summary.supervised_share,
        batching=sampler.batching,
        padding=padding_share(sampler) if sampler.batching == "padded" else 0.0,
        selects_logits=collator.selects_logits,
        loss_weighting=collator.weighting,
        chat_format=chat_format,
        attention=model.config._attn_implementation + (", per conversation" if sampler.batching != "padded" else ""),
        epochs=steps / sampler.steps_per_epoch,
        steps=steps,
        start_up=start_up_seconds(),
        held_out=held_out,
    )
