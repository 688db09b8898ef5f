"""Resolve a DeepSpeed JSON with the command line and the world size, before anything expensive happens.

`transformers` fills `"auto"` values too, but reports mismatches only once the model is loaded, and DeepSpeed reports
others later still. Here every value that the command line decides is compared first, and all faults are
reported together, each with both values and the fix.

Keys: https://www.deepspeed.ai/docs/config-json/ ; what transformers fills: transformers/integrations/deepspeed.py.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune.config.hardware import Precision
from finetune.utils.errors import ConfigError, format_faults
from finetune.utils.proc import shipped_folder
from finetune.utils.user_files import json_kind, read_json_object

AUTO = "auto"
STAGES = (0, 1, 2, 3)
# Filled by transformers once the model's hidden size, or the number of steps, is known.
LEFT_TO_TRANSFORMERS = {
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "scheduler.params.total_num_steps",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.warmup_min_lr",
}
NEEDS_CUDA = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


@dataclass(frozen=True)
class DeepSpeedFlags:
    """The plain values a config is checked against, under their flag names."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    precision: Precision
    precision_was_replaced: bool = False


@dataclass(frozen=True)
class ResolvedDeepSpeedConfig:
    """`config` is what DeepSpeed gets (values known only with the model still `"auto"`); `notes` are for the user."""

    path: str
    config: dict[str, Any]
    stage: int
    notes: tuple[str, ...] = ()

    @property
    def offloads(self) -> bool:
        """Whether parameters or optimizer states live on the host or on disk."""
        zero = self.config.get("zero_optimization", {})
        places = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
        return any(place.get("device", "none") != "none" for place in places)


def shipped_names() -> list[str]:
    """The names that `--deepspeed NAME` finds without a path."""
    return sorted(path.stem for path in shipped_folder("ds_configs").glob("*.json"))


def find_config(name: str) -> Path:
    """Return a path as given, or that of a shipped config by its bare name (`zero3`)."""
    path = Path(name).expanduser()
    if os.path.isfile(path):  # unlike Path.is_file, False for a name longer than the file system allows
        return path
    if path.name == name and path.stem in shipped_names():
        return shipped_folder("ds_configs") / f"{path.stem}.json"
    close = get_close_matches(path.stem, shipped_names(), n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"--deepspeed {name}: there is no such file; {hint}the shipped ones can be given by name: "
        + ", ".join(shipped_names())
    )


def load_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON strictly: a key given twice, a NaN or Infinity are errors, too."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ConfigError(f'{path}: the key "{key}" is given twice in one object: keep one of them')
            values[key] = value
        return values

    def no_constant(name: str) -> None:
        raise ConfigError(f"{path}: {name} is not JSON: give a number")

    return read_json_object(path, object_pairs_hook=without_duplicates, parse_constant=no_constant)


def resolve_deepspeed_config(
    path: Path,
    config: Mapping[str, Any],
    command: DeepSpeedFlags,
    *,
    world_size: int,
    local_world_size: int,
    use_cpu: bool,
    sequence_parallel_size: int = 1,
) -> ResolvedDeepSpeedConfig:
    """Fill every `"auto"` that the command line decides, and check every value that it contradicts.

    Args:
        path: where `config` came from, for messages.
        local_world_size: ranks on this host (what ZeRO++ calls hpz).
        sequence_parallel_size: ranks that share each conversation, of which DeepSpeed must know from the start.

    Raises:
        ConfigError: all faults at once, each naming both values and the fix.
    """
    resolver = _Resolver(copy.deepcopy(dict(config)))
    resolved, stage = resolver.config, resolver.stage()
    if not resolver.faults:
        resolver.resolve_precision(command)
        resolver.resolve_batch_and_optimizer(command, world_size // sequence_parallel_size)
        resolver.resolve_zero(stage, world_size, local_world_size, use_cpu)
        resolver.check_leftover_autos(resolved)
        if sequence_parallel_size > 1:
            resolved["sequence_parallel_size"] = sequence_parallel_size
            resolved.pop("train_batch_size", None)  # transformers and DeepSpeed disagree on its meaning here
            resolved["zero_optimization"]["reduce_scatter"] = True  # see SupervisedTrainer._ranks_averaged_over
    if resolver.faults:
        raise ConfigError(format_faults([f"{path}: {fault}" for fault in resolver.faults], "fault"))
    return ResolvedDeepSpeedConfig(str(path), resolved, stage, tuple(f"{path}: {note}" for note in resolver.notes))


class _Resolver:
    """A config while it is resolved, with the faults and notes so far."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.faults: list[str] = []
        self.notes: list[str] = []

    def stage(self) -> int:
        zero = self.config.get("zero_optimization", {})
        if not isinstance(zero, dict):
            self.faults.append(f"zero_optimization: expected an object, found {json_kind(zero)}")
            return 0
        stage = zero.get("stage", 0)
        if isinstance(stage, bool) or stage not in STAGES:
            self.faults.append(f"zero_optimization.stage is {json.dumps(stage)}: expected 0, 1, 2 or 3")
            return 0
        if "zero_optimization" not in self.config:
            close = get_close_matches("zero_optimization", self.config, n=1, cutoff=0.7)
            if close:
                self.faults.append(f'"{close[0]}" is not a DeepSpeed key: did you mean "zero_optimization"?')
        return stage

    def resolve_precision(self, command: DeepSpeedFlags) -> None:
        for precision in ("bf16", "fp16"):
            wanted = command.precision == precision
            section = self.config.get(precision)
            if section is None and wanted:
                self.config[precision] = {"enabled": True}
            elif isinstance(section, dict):
                value = section.get("enabled", False)
                if value in (AUTO, wanted):
                    section["enabled"] = wanted
                elif value is True and command.precision_was_replaced:
                    section["enabled"] = False
                    self.notes.append(f"{precision}.enabled is off for the same reason as the flag")
                else:
                    fix = f"--{precision} True" if value else f'"{precision}": {{"enabled": "auto"}} there'
                    computes = f"but this run computes in {command.precision}: give {fix}"
                    self.faults.append(f"{precision}.enabled is {json.dumps(value)}, {computes}")
            elif section is not None:
                self.faults.append(f'{precision}: expected an object such as {{"enabled": "auto"}}')

    def resolve_batch_and_optimizer(self, command: DeepSpeedFlags, world_size: int) -> None:
        micro, accumulation = command.per_device_train_batch_size, command.gradient_accumulation_steps
        decided = [
            ("train_micro_batch_size_per_gpu", micro, "--per_device_train_batch_size"),
            ("gradient_accumulation_steps", accumulation, "--gradient_accumulation_steps"),
            ("gradient_clipping", command.max_grad_norm, "--max_grad_norm"),
            ("optimizer.params.lr", command.learning_rate, "--learning_rate"),
            ("optimizer.params.betas", [command.adam_beta1, command.adam_beta2], "--adam_beta1, --adam_beta2"),
            ("optimizer.params.eps", command.adam_epsilon, "--adam_epsilon"),
            ("optimizer.params.weight_decay", command.weight_decay, "--weight_decay"),
            ("scheduler.params.warmup_max_lr", command.learning_rate, "--learning_rate"),
        ]
        for key, value, flag in decided:
            self.fill_or_compare(key, value, f"{flag} is {json.dumps(value)}", f"or give {flag} its value")
        product = micro * accumulation * world_size
        factors = f"{micro} per device x {accumulation} accumulated x {world_size} ranks is {product}"
        self.fill_or_compare("train_batch_size", product, factors, "or change one of them")

    def fill_or_compare(self, key: str, value: Any, other: str, remedy: str) -> None:
        node, last = _node(self.config, key)
        if node is None or (last not in node and "." in key):
            return
        if node.get(last, AUTO) == AUTO:
            node[last] = value
        elif _as_number(node[last]) != _as_number(value):
            self.faults.append(f'{key} is {json.dumps(node[last])}, but {other}: write "auto" there, {remedy}')
        else:
            node[last] = value  # "8" becomes 8: DeepSpeed compares without converting

    def resolve_zero(self, stage: int, world_size: int, local_world_size: int, use_cpu: bool) -> None:
        zero = self.config.setdefault("zero_optimization", {"stage": stage})
        gathers = "stage3_gather_16bit_weights_on_model_save"
        if stage == 3 and zero.get(gathers) is not True:
            zero[gathers] = True
            self.notes.append(f"{gathers} is switched on: without it no model is saved")
        self.resolve_hpz(zero, world_size, local_world_size)
        for name in NEEDS_CUDA if use_cpu else ():
            if zero.get(name):
                zero[name] = False
                self.notes.append(f"{name} is off: its kernels need a GPU")
        for key in ("offload_optimizer", "offload_param"):
            offload = zero.get(key)
            if offload is None:
                continue
            if not isinstance(offload, dict) or offload.get("device", "none") not in ("none", "cpu", "nvme"):
                self.faults.append(f'{key} is {json.dumps(offload)}: expected {{"device": "cpu"}} or "nvme" or "none"')
                continue
            if key == "offload_param" and stage != 3 and offload.get("device", "none") != "none":
                self.faults.append(f"offload_param needs ZeRO stage 3, but zero_optimization.stage is {stage}")
            nvme = offload.get("nvme_path")
            if offload.get("device") == "nvme" and not (isinstance(nvme, str) and nvme and os.path.isdir(nvme)):
                self.faults.append(
                    f"{key}.nvme_path is {json.dumps(nvme)}, which is no folder on this host: "
                    "copy the config and name a folder on a local NVMe disk"
                )

    def resolve_hpz(self, zero: dict[str, Any], world_size: int, local_world_size: int) -> None:
        """ZeRO++ keeps a second copy of the weights in each group of `zero_hpz_partition_size` ranks, one host each."""
        size = zero.get("zero_hpz_partition_size")
        if size == AUTO:
            zero["zero_hpz_partition_size"] = local_world_size
            if world_size % local_world_size:
                self.faults.append(
                    f"zero_hpz_partition_size is the {local_world_size} ranks of this host, which do not divide the "
                    f"{world_size} ranks: give every host as many, or leave the key out"
                )
        elif size is not None and (type(size) is not int or size < 1 or world_size % size):
            self.faults.append(
                f"zero_hpz_partition_size is {json.dumps(size)}, which does not divide the {world_size} ranks: "
                f'write "auto" (the ranks of one host, here {local_world_size})'
            )

    def check_leftover_autos(self, config: Mapping[str, Any], prefix: str = "") -> None:
        for key, value in config.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                self.check_leftover_autos(value, f"{name}.")
            elif value == AUTO and name not in LEFT_TO_TRANSFORMERS:
                self.faults.append(f'{name} is "auto", but nothing on the command line decides it: give a value')


def _node(config: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), last


def _as_number(value: Any) -> Any:
    """`"8"`, 8 and 8.0 are one value; lists are compared element by element."""
    if isinstance(value, list):
        return [_as_number(item) for item in value]
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value
