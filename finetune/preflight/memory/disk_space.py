"""Bytes on disk: the result, one checkpoint, and everything the output folder holds at most."""

from __future__ import annotations

from finetune.checkpoint.checkpoint_size import ParameterSizes, checkpoint_parts, saved_model_bytes
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

SMALL_FILES = 20_000_000  # tokenizer, Trainer state, random number state: an allowance


def result(shape: ModelSpec, job: RunSpec) -> float:
    """Bytes of the trained model or adapter in the output folder."""
    return saved_model_bytes(_sizes(shape, job), job.stage)


def checkpoint(shape: ModelSpec, job: RunSpec) -> dict[str, float]:
    """Bytes of one checkpoint by part, of all ranks together."""
    return checkpoint_parts(_sizes(shape, job), job.stage, only_model=job.only_model)


def kept(shape: ModelSpec, job: RunSpec) -> float | None:
    """Bytes that the output folder takes at most: the result, the checkpoints that are kept, and one more, because the
    oldest is removed only after the newest is complete. None: every checkpoint is kept."""
    if not job.keep_checkpoints:
        return None
    each = sum(checkpoint(shape, job).values()) + SMALL_FILES
    return result(shape, job) + (job.keep_checkpoints + 1) * each


def _sizes(shape: ModelSpec, job: RunSpec) -> ParameterSizes:
    weight_size = 4 if job.stage is None else job.size
    return ParameterSizes(
        total=weight_size * shape.parameters,
        trained=weight_size * shape.trainable,
        num_trained=shape.trainable,
        tied=weight_size * shape.embedding if shape.tied else 0,
        has_adapter=shape.adapter,
    )
