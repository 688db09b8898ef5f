"""Resolve a DeepSpeed JSON with the command line and the world size, before anything expensive happens.

`transformers` fills `"auto"` values too, but reports mismatches only once the model is loaded, and DeepSpeed reports
others later still. Here every value that the command line decides is compared first, and all faults are
reported together, each with both values and the fix.

Keys: https://www.deepspeed.ai/docs/config-json/ ; what transformers fills: transformers/integrations/deepspeed.py.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.deepspeed_flags import (
    AUTO,
    DeepSpeedFlags,
    resolve_accumulation,
    resolve_optimizer,
    resolve_precision,
    resolve_schedule,
    resolve_values,
)
from finetune.config.deepspeed_schema import remove_key, schema_faults, section_faults, without_comments
from finetune.utils.errors import ConfigError, did_you_mean, missing_reason, raise_faults
from finetune.utils.proc import shipped_folder
from finetune.utils.user_files import read_json_object, unique_keys

STAGES = (0, 1, 2, 3)
# Filled by transformers once the model's hidden size is known.
LEFT_TO_TRANSFORMERS = {
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
}
NEEDS_CUDA = ("zero_quantized_weights", "zero_quantized_gradients")
# DeepSpeed accepts these keys at every stage and ignores them below stage 3; with them, the values that mean "off".
STAGE_3_ONLY = {"zero_hpz_partition_size": 1} | dict.fromkeys(NEEDS_CUDA, False)


@dataclass(frozen=True)
class ResolvedDeepSpeedConfig:
    """`config` is what DeepSpeed gets (values known only with the model still `"auto"`); `notes` are for the user."""

    path: str
    config: dict[str, Any]
    stage: int
    notes: tuple[str, ...] = ()
    lr_scheduler_type: str | None = None  # that its `scheduler` section means

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
    if os.path.isdir(path):
        raise ConfigError(f"--deepspeed {name}: is a folder: name the JSON file in it")
    named = f"the shipped ones can be given by name: {', '.join(shipped_names())}"
    hint = did_you_mean(path.stem, shipped_names(), cutoff=0.4)
    raise ConfigError(f"--deepspeed {name}: {missing_reason(path)}; {hint + ' ' if hint else ''}{named}")


def load_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON strictly: a key given twice, a NaN or Infinity are errors, too."""

    def no_constant(name: str) -> None:
        raise ConfigError(f"{path}: {name} is not JSON: give a number")

    return read_json_object(path, object_pairs_hook=unique_keys, parse_constant=no_constant)


def resolve_deepspeed_config(
    path: Path,
    config: Mapping[str, Any],
    command: DeepSpeedFlags,
    *,
    world_size: int,
    local_world_size: int,
    use_cpu: bool,
    sequence_parallel_size: int = 1,
    imports_deepspeed: bool = True,
) -> ResolvedDeepSpeedConfig:
    """Fill every `"auto"` that the command line decides, and check every value that it contradicts.

    Args:
        path: where `config` came from, for messages.
        local_world_size: ranks on this host (what ZeRO++ calls hpz).
        sequence_parallel_size: ranks that share each conversation, of which DeepSpeed must know from the start.
        imports_deepspeed: False leaves out what only its own code can say, and takes no seconds.

    Raises:
        ConfigError: all faults at once, each naming both values and the fix.
    """
    resolver = _Resolver(without_comments(config))
    resolved, stage, faults, notes = resolver.config, resolver.stage(), resolver.faults, resolver.notes
    schedule = None
    if not faults:
        resolver.compare_sharing(sequence_parallel_size)
        for key, text in schema_faults(resolved, imports_deepspeed=imports_deepspeed):
            faults.append(text)
            remove_key(resolved, key)
        resolve_precision(resolved, command, faults, notes)
        schedule = resolve_schedule(resolved, command, faults, notes)
        resolve_optimizer(resolved, command, stage, use_cpu=use_cpu, faults=faults, notes=notes)
        resolve_values(resolved, command, world_size // sequence_parallel_size, faults)
        resolve_accumulation(resolved, command, stage, notes)
        resolver.resolve_zero(stage, world_size, local_world_size, use_cpu)
        resolver.check_quantized_gradients(command.precision)
        resolver.check_leftover_autos(resolved)
        # DeepSpeed's own timer lets each micro-batch on a GPU wait for the one before it; metrics.jsonl has the rates.
        resolved.setdefault("timers", {"throughput": {"enabled": False}})
        if any((resolved.get("activation_checkpointing") or {}).values()):
            notes.append("the section activation_checkpointing has no effect: --activation_checkpointing True decides")
        if sequence_parallel_size > 1:
            resolved["sequence_parallel_size"] = sequence_parallel_size
            resolved.pop("train_batch_size", None)  # transformers and DeepSpeed disagree on its meaning here
            resolved["zero_optimization"]["reduce_scatter"] = True  # see SupervisedTrainer._ranks_averaged_over
    raise_faults(f"{path}: {fault}" for fault in resolver.faults)
    notes = [f"{path}: {note}" for note in notes]
    return ResolvedDeepSpeedConfig(str(path), resolved, stage, tuple(notes), schedule)


class _Resolver:
    """A config while it is resolved, with the faults and notes so far."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.faults: list[str] = []
        self.notes: list[str] = []

    def stage(self) -> int:
        self.faults += section_faults(self.config)
        stage = 0 if self.faults else self.config.get("zero_optimization", {}).get("stage", 0)
        if isinstance(stage, bool) or stage not in STAGES:
            self.faults.append(f"zero_optimization.stage is {json.dumps(stage)}: expected 0, 1, 2 or 3")
            return 0
        return stage

    def compare_sharing(self, size: int) -> None:
        value = self.config.pop("sequence_parallel_size", AUTO)
        if value not in (AUTO, size):
            self.faults.append(
                f"sequence_parallel_size is {json.dumps(value)}, but --sequence_parallel_size is {size}: leave the key "
                "out"
            )

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
        offloads = {key: zero.get(key) or {} for key in ("offload_optimizer", "offload_param")}
        devices = {key: offload.get("device", "none") for key, offload in offloads.items()}
        needed: list[tuple[str, tuple[int, ...]]] = [
            (key, (3,)) for key, off in STAGE_3_ONLY.items() if zero.get(key, off) != off
        ]
        needed += [("offload_param", (3,))] * (devices["offload_param"] != "none")
        if devices["offload_optimizer"] != "none":  # below stage 3 DeepSpeed offloads to host memory instead of a disk
            is_nvme = devices["offload_optimizer"] == "nvme"
            needed.append(("offload_optimizer to NVMe", (3,)) if is_nvme else ("offload_optimizer", (1, 2, 3)))
        for what, stages in needed:
            if stage not in stages:
                expected = " or ".join(map(str, stages))
                self.faults.append(f"{what} needs ZeRO stage {expected}, but zero_optimization.stage is {stage}")
        for key in [key for key, device in devices.items() if device == "nvme"]:
            nvme = offloads[key].get("nvme_path")
            if not (isinstance(nvme, str) and nvme and os.path.isdir(nvme)):
                self.faults.append(
                    f"{key}.nvme_path is {json.dumps(nvme)}, which is no folder on this host: "
                    "copy the config and name a folder on a local NVMe disk"
                )

    def check_quantized_gradients(self, precision: str) -> None:
        """Refuse 4-bit gradients in other precisions than fp16: DeepSpeed's kernel reads the bits as fp16 (0.19.8)."""
        kinds = [precision, self.config.get("communication_data_type") or precision]
        others = [kind for kind in kinds if kind != "fp16"]
        if self.config["zero_optimization"].get("zero_quantized_gradients") and others:
            self.faults.append(
                f"zero_quantized_gradients is true, but gradients are {others[0]}, which DeepSpeed's kernel reads as "
                "fp16: set it to false"
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
            elif value == AUTO and name not in LEFT_TO_TRANSFORMERS and not self.is_named(name):
                self.faults.append(f'{name} is "auto", but nothing on the command line decides it: give a value')

    def is_named(self, name: str) -> bool:
        """Return whether a fault is about this key already."""
        return any(fault.startswith((f"{name} is ", f'"{name}" is ')) for fault in self.faults)
