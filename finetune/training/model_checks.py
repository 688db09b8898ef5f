"""Check a run against its model, without weights: attention, sequence parallelism, activation checkpointing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.config.run_config import ActivationCheckpointing, BatchConfig, RunConfig
from finetune.distributed.op_builder import build_notes
from finetune.distributed.startup_timer import timed
from finetune.models.loader import ModelInfo, inspect_model
from finetune.utils.errors import ConfigError


@timed("checks")
def check_model(config: RunConfig) -> tuple[RunConfig, ModelInfo]:
    """Inspect the model, and adapt the config to what its code can do.

    Raises:
        ConfigError: what the model cannot do.
    """
    info = inspect_model(config.model, config.hardware.attention)
    check_sequence_parallel(config.batch, info.config, config.zero_stage)
    checkpointing, notes = resolve_activation_checkpointing(
        config.activation_checkpointing, config.adapter.kind(), info.can_checkpoint
    )
    if config.deepspeed is not None:
        notes += build_notes(Path(os.environ["TORCH_EXTENSIONS_DIR"]), use_cpu=config.hardware.use_cpu)
    adapted = replace(
        config,
        hardware=replace(config.hardware, attention=info.attention),
        activation_checkpointing=checkpointing,
        notes=(*config.notes, *info.notes, *notes),
    )
    return adapted, info


def check_sequence_parallel(batch: BatchConfig, model_config: Any, zero_stage: int | None) -> None:
    """Check that each rank of a group gets the same share of a conversation's tokens and of the attention heads.

    Raises:
        ConfigError: `--sequence_parallel_size` fits neither the ranks nor the model; all reasons at once.
    """
    size = batch.sequence_parallel_size
    if size == 1:
        return
    config = model_config.get_text_config()
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    faults = {
        "it needs DeepSpeed: give --deepspeed zero3": zero_stage is None,
        f"it does not divide the {batch.world_size} ranks": batch.world_size % size,
        f"it does not divide the model's {heads} attention heads": heads % size,
        f"the model's {key_heads} key heads neither divide it nor are divided by it": key_heads % size
        and size % key_heads,
        "ranks can only share flat or packed rows: leave out --batching padded": batch.batching == "padded",
    }
    reasons = [reason for reason, applies in faults.items() if applies]
    if reasons:
        raise ConfigError(f"--sequence_parallel_size {size}: " + "; ".join(reasons))


def resolve_activation_checkpointing(
    requested: ActivationCheckpointing, adapter: str | None, supported: bool
) -> tuple[ActivationCheckpointing, list[str]]:
    """Switch activation checkpointing off where the adapter or the model's code does not support it.

    Args:
        adapter: lora, prefix, prompt or None.
        supported: whether the model's code can recompute activations.

    Returns:
        What is done, and lines for the user.
    """
    reason = None
    if adapter == "prefix":
        reason = "prefix tuning passes a cache to each layer, which checkpointing would drop"
    elif not supported:
        reason = "this model's code does not support it"
    if requested.enabled and reason:
        return replace(requested, enabled=False), [f"--gradient_checkpointing is off: {reason}"]
    return requested, requested.notes()
