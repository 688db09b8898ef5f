"""What a run takes over from a saved adapter that it continues from. Needs no torch."""

import json
from pathlib import Path
from typing import Any

from finetune.config.adapter_arguments import KINDS_OF_METHODS, UNSERVED, unserved
from finetune.run_dir import run_json
from finetune.utils.errors import ConfigError, near_paths, raise_faults
from finetune.utils.hub import adapter_on_hub
from finetune.utils.user_files import has_type, read_json_object

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Our flags, what peft calls them, and the types of their values.
LORA_FLAGS: dict[str, tuple[str, Any]] = {
    "lora_r": ("r", int),
    "lora_alpha": ("lora_alpha", float),
    "lora_dropout": ("lora_dropout", float),
    "use_dora": ("use_dora", bool | None),
    "use_rslora": ("use_rslora", bool | None),
    "modules_to_save": ("modules_to_save", list[str] | None),
}
# Initialisations that change the weights of the base, which a run would start from another time.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the config of a saved adapter; one that names a module which peft would import is an error."""
    path = folder / run_json.ADAPTER_CONFIG
    config = read_json_object(path)
    if not isinstance(config.get("peft_type"), str) or config.get("megatron_config"):
        raise ConfigError(f"{path}: not the config of an adapter of this project or of peft: copy the file again")
    return config


def continue_adapter(given: dict[str, Any]) -> list[str]:
    """Replace an adapter as the model by its base, and fill in the flags that it decides; return notes for the user.

    Args:
        given: flags by name, as they were given; changed here.

    Raises:
        ConfigError: no adapter, one that cannot be continued, flags that contradict it, a base that is not there.
    """
    model, adapter = given.get("model_name_or_path"), given.pop("adapter_name_or_path", None)
    if not adapter:
        downloaded = adapter_on_hub(model or "", given.get("model_revision"))
        if downloaded:
            given.pop("model_revision", None)  # it is the adapter's
        folder = downloaded or Path(model or "").expanduser()
        is_model = any(folder.glob("model*.safetensors*")) or any(folder.glob("pytorch_model*"))
        if not model or is_model or not run_json.is_adapter(folder):
            return []
        shown = f"--model_name_or_path {model}"
    else:
        folder = adapter_on_hub(adapter) or Path(adapter).expanduser()
        shown = f"--adapter_name_or_path {adapter}"
        if not run_json.is_adapter(folder):
            lacks = f"holds no {run_json.ADAPTER_CONFIG}" if folder.is_dir() else f"no such folder{near_paths(folder)}"
            raise ConfigError(f"{shown}: {lacks}: give the folder of a saved adapter")
    config, trained_with = read_adapter_config(folder), _recorded(folder, "arguments")
    raise_faults(f"{shown}: {reason}" for reason in _obstacles(folder, config))
    kept = _kept_flags(config)
    conflicts = []
    for name, value in {**kept, "init_lora_weights": "default"}.items():
        accepted = [value, trained_with.get(name)] if isinstance(value, list) else [value]
        if name in given and not any(_is_same(given[name], other) for other in accepted):
            conflicts.append(f"--{name} {_typed(given[name])}: the adapter {folder} has {_typed(value)}: leave it out")
    raise_faults(conflicts)
    bits = [f"load_in_{bits}bit" for bits in (4, 8)]
    if not any(name in given for name in bits):
        kept |= {name: True for name in bits if trained_with.get(name) is True}
    if not adapter:
        given["model_name_or_path"], revision = _base(folder, config)
        if revision and "model_revision" not in given:
            kept["model_revision"] = revision
    given.update(kept, adapter_name_or_path=str(folder))
    shape = f"r {config['r']}, alpha {config['lora_alpha']:g}, " if config["peft_type"] == "LORA" else ""
    return [f"continuing the adapter {adapter or model} ({shape}base {given['model_name_or_path']})"]


def recorded_weights(folder: Path) -> str | None:
    """Return the fingerprint of the base weights that our run trained the adapter on; None of other adapters."""
    weights = _recorded(folder, "model").get("weights")
    return weights if isinstance(weights, str) else None


def _recorded(folder: Path, part: str) -> dict[str, Any]:
    """Return a part of the run.json of the run that saved the adapter; empty where another program did."""
    place = folder.absolute()
    value = run_json.known(place.parent if place.name.startswith("checkpoint-") else place).get(part)
    return value if isinstance(value, dict) else {}


def _obstacles(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return why a run cannot continue from this adapter."""
    kind = config["peft_type"]
    if kind in UNSERVED or kind == "P_TUNING":  # it saves what its encoder computed, not the encoder
        return [f"an adapter of the type {kind} cannot be continued: train a new one"]
    faults = adapter_damage(folder, config)
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(MOVES_BASE):
        faults.append(f"was saved for the base as {start} has changed it: save it with peft's "
                      "path_initial_model_for_weight_conversion, or merge it")  # fmt: skip
    reasons = dict(unserved(config))
    if config.get("prefix_projection"):
        reasons["prefix_projection"] = "its encoder was not saved"
    for key, reason in reasons.items():
        faults.append(f"{key} is {config[key]!r}, which cannot be continued here: {reason}: merge it with peft")
    return faults


def adapter_damage(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return what a saved adapter lacks: its weights, or values of its config that are of their types."""
    lacks = not any((folder / name).is_file() for name in ADAPTER_FILES)
    faults = [f"holds no {' or '.join(ADAPTER_FILES)}: copy the whole adapter"] if lacks else []
    kind = config["peft_type"]
    types = {"num_virtual_tokens": int} if kind in ("PREFIX_TUNING", "PROMPT_TUNING") else {}
    types |= {key: hint for key, hint in LORA_FLAGS.values()} if kind == "LORA" else {}
    for key, hint in types.items():
        if not has_type(config.get(key), hint):
            faults.append(f"{key} is {config.get(key)!r} in {run_json.ADAPTER_CONFIG}: copy the file again")
    return faults


def _kept_flags(config: dict[str, Any]) -> dict[str, Any]:
    kind = KINDS_OF_METHODS.get(config["peft_type"])
    if kind is None:
        return {"adapter_config": json.dumps(config, sort_keys=True)}
    if kind != "lora":
        return {"adapter": kind, "use_lora": False, "num_virtual_tokens": config["num_virtual_tokens"]}
    values = {flag: config.get(key) for flag, (key, _) in LORA_FLAGS.items()}
    values |= {flag: bool(values[flag]) for flag in ("use_dora", "use_rslora")}
    targets = config.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else [*targets, *(config.get("target_parameters") or [])]
    return {"use_lora": True, "adapter": "lora", **values, "modules_to_save": values["modules_to_save"] or [],
            "lora_target_modules": sorted(names)}  # fmt: skip


def _is_same(given: Any, value: Any) -> bool:
    return sorted(given) == sorted(value) if isinstance(given, list) and isinstance(value, list) else given == value


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _base(folder: Path, config: dict[str, Any]) -> tuple[str, str | None]:
    """Return the name or folder of the base, and its revision on the hub."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    absolute = _recorded(folder, "model").get("folder")
    for place in (name, absolute):
        if isinstance(place, str) and place and Path(place).expanduser().is_dir():
            return place, None
    remedy = f"give it: --model_name_or_path BASE --adapter_name_or_path {folder}"
    if not isinstance(name, str) or not name:
        raise ConfigError(f"--model_name_or_path {folder}: an adapter that names no base: {remedy}")
    if absolute or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"--model_name_or_path {folder}: an adapter, whose base {absolute or name} is not there: {remedy}"
        )
    return name, revision if isinstance(revision, str) else None
