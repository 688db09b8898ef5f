"""`transformers.TrainingArguments` from plain values; building them touches the device and starts the processes."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from finetune.utils.errors import ConfigError


def build_arguments(values: dict[str, Any], *, sequence_parallel_size: int = 1) -> TrainingArguments:
    """`TrainingArguments` from plain values.

    Raises:
        ConfigError: a value that transformers refuses.
    """
    if sequence_parallel_size > 1:
        values = {**values, "parallelism_config": _sequence_parallelism(sequence_parallel_size)}
    try:
        return TrainingArguments(**values)
    except ValueError as error:
        raise ConfigError(f"the training flags contradict each other: {error}") from None


def _sequence_parallelism(size: int) -> Any:
    from accelerate.parallelism_config import ParallelismConfig

    return ParallelismConfig(sp_backend="deepspeed", sp_size=size)
