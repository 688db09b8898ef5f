"""Resolve a DeepSpeed JSON with the command line and the world size, before anything expensive happens.

`transformers` fills `"auto"` values too, but reports mismatches only once the model is loaded, and DeepSpeed reports
others later still. Here every value that the command line decides is compared first, and all faults are
reported together, each with both values and the fix.

Keys: https://www.deepspeed.ai/docs/config-json/ ; what transformers fills: transformers/integrations/deepspeed.py.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.deepspeed_optimizers import offload_devices
from finetune.config.deepspeed_resolver import DeepSpeedFlags, DeepSpeedResolver
from finetune.config.deepspeed_schema import without_comments
from finetune.utils.errors import ConfigError, did_you_mean, missing_reason, raise_faults
from finetune.utils.proc import shipped_folder
from finetune.utils.user_files import read_json_object, unique_keys


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
        return any(device != "none" for device in offload_devices(self.config).values())


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
    resolver = DeepSpeedResolver(
        without_comments(config), command, world_size, local_world_size, use_cpu, sequence_parallel_size
    )
    resolver.resolve(imports_deepspeed=imports_deepspeed)
    raise_faults(f"{path}: {fault}" for fault in resolver.faults)
    notes = tuple(f"{path}: {note}" for note in resolver.notes)
    return ResolvedDeepSpeedConfig(str(path), resolver.config, resolver.stage, notes, resolver.lr_scheduler_type)
