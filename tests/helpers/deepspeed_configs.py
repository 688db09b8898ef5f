"""DeepSpeed configs resolved for tests, and what is said of those that are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.deepspeed_config import (
    DeepSpeedFlags,
    ResolvedDeepSpeedConfig,
    find_config,
    load_config,
    resolve_deepspeed_config,
)
from finetune.utils.errors import ConfigError

COMMAND = DeepSpeedFlags(
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    max_grad_norm=1.0,
    learning_rate=2e-5,
    adam_beta1=0.9,
    adam_beta2=0.98,
    adam_epsilon=1e-8,
    weight_decay=1e-4,
    precision="bf16",
)


FLOAT32 = replace(COMMAND, precision="float32")


def resolved(
    config: dict, command: DeepSpeedFlags = COMMAND, ranks: int = 4, **options: Any
) -> ResolvedDeepSpeedConfig:
    options = {"world_size": ranks, "local_world_size": ranks, "use_cpu": False, **options}
    return resolve_deepspeed_config(Path("mine.json"), config, command, **options)


def refusal(config: dict, command: DeepSpeedFlags = COMMAND, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        resolved(config, command, **options)
    return str(raised.value)


def shipped(name: str, nvme: Path) -> dict:
    """A shipped config; where it names an NVMe folder, `nvme` stands in for it."""
    config = load_config(find_config(name))
    for key in ("offload_optimizer", "offload_param"):
        if "nvme_path" in config["zero_optimization"].get(key, {}):
            config["zero_optimization"][key]["nvme_path"] = str(nvme)
    return config


def nested(key: str, value: Any) -> dict:
    """`nested("a.b", 1)` is {"a": {"b": 1}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def typed(config: dict) -> dict:
    """The config with a type in its `optimizer` and `scheduler` sections."""
    kinds = {"optimizer": "AdamW", "scheduler": "WarmupDecayLR"}
    return {key: {"type": kinds[key], **value} if key in kinds else value for key, value in config.items()}
