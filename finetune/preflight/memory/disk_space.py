"""Bytes on a disk: a checkpoint as DeepSpeed and transformers write it, the result, and all that stays."""

from __future__ import annotations

from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

MODEL, MODEL_STATES, OPTIMIZER = "saved model", "DeepSpeed's copy of it", "optimizer states"
SMALL_FILES = 20_000_000  # tokenizer, states of the Trainer and of random numbers: an allowance


def result(shape: ModelSpec, job: RunSpec) -> float:
    """Bytes of the trained model, or of the adapter, as it is saved in the output folder.

    Under DeepSpeed's stages 0 to 2 accelerate copies each tensor apart before it is saved, so that a tied head is
    written beside the embeddings.
    """
    if shape.adapter:
        return _weight_size(job) * shape.trainable
    twice = shape.embedding if shape.tied and job.stage in (0, 1, 2) else 0
    return _weight_size(job) * (shape.parameters + twice)


def checkpoint(shape: ModelSpec, job: RunSpec) -> dict[str, float]:
    """Bytes of one checkpoint, of all ranks together.

    The model is there twice under DeepSpeed, once for transformers and once for itself. From its own copy beside
    adapters it leaves out the frozen parameters that it knows by name, which a tied head is not. Under ZeRO-3 the copy
    is in the shards of the optimizer alone. For each trained parameter these hold a master and two moments in float32.
    """
    parts = {MODEL: result(shape, job)}
    if job.only_model:
        return parts
    if job.stage is None:
        return {**parts, OPTIMIZER: 8 * shape.trainable}
    masters = 0 if job.stage == 0 and job.size == 4 else 4
    tied = shape.embedding if shape.tied else 0
    own = shape.trainable + tied if shape.adapter else shape.parameters
    return {
        **parts,
        MODEL_STATES: 0 if job.stage == 3 else job.size * own,
        OPTIMIZER: (8 + masters) * shape.trainable,
    }


def kept(shape: ModelSpec, job: RunSpec) -> float | None:
    """Bytes that the output folder takes at most: the result, the checkpoints that stay, and one more while it is
    written, because an older one goes only after that. None: all stay, as many as are written."""
    if not job.keep_checkpoints:
        return None
    one = sum(checkpoint(shape, job).values()) + SMALL_FILES
    return result(shape, job) + (job.keep_checkpoints + 1) * one


def _weight_size(job: RunSpec) -> int:
    return 4 if job.stage is None else job.size
