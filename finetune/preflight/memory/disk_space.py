"""Bytes on disk: the result, one checkpoint, and everything the output folder holds at most."""

from __future__ import annotations

from finetune.checkpoint.checkpoint_size import ParameterSizes, checkpoint_parts, saved_model_bytes
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

SMALL_FILES = 20_000_000  # tokenizer, Trainer state, random number state: an allowance


def result(model: ModelSpec, run: RunSpec) -> float:
    """Bytes of the trained model or adapter in the output folder."""
    return saved_model_bytes(_sizes(model, run), run.stage)


def checkpoint(model: ModelSpec, run: RunSpec) -> dict[str, float]:
    """Bytes of one checkpoint by part, of all ranks together."""
    return checkpoint_parts(_sizes(model, run), run.stage, only_model=run.only_model)


def kept(model: ModelSpec, run: RunSpec) -> float | None:
    """Bytes that the output folder takes at most: the result, the checkpoints that are kept, and one more, because the
    oldest is removed only after the newest is complete. None: every checkpoint is kept."""
    if not run.keep_checkpoints:
        return None
    each = sum(checkpoint(model, run).values()) + SMALL_FILES
    return result(model, run) + (run.keep_checkpoints + 1) * each


def _sizes(model: ModelSpec, run: RunSpec) -> ParameterSizes:
    weight_size = 4 if run.stage is None else run.size
    return ParameterSizes(
        total=weight_size * model.parameters,
        trained=weight_size * model.trainable,
        num_trained=model.trainable,
        tied=weight_size * model.embedding if model.tied else 0,
        has_adapter=model.adapter,
    )
