"""The result of a training run as the files of its `output_dir` describe it. No weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from finetune.checkpoint import key_of, step_of, steps_in, verify_checkpoint
from finetune.config.hardware import Precision
from finetune.config.saved_adapter import adapter_damage
from finetune.models.stored_tensors import stored_names
from finetune.run_dir.run_json import (
    ADAPTER_CONFIG,
    COMPLETE_FILE,
    MODEL_CONFIGS,
    RUN_FILE,
    check_is_folder,
    holds_model,
    load_run_json,
)
from finetune.utils.errors import CheckpointError, ConfigError, first_line, raise_faults
from finetune.utils.user_files import UNREADABLE, has_type

TRUST_HELP = "run the Python files of the model or of its base; what run.json says of the training is no permission"
TYPES: dict[str, dict[str, Any]] = {  # of what is used of run.json
    "model": {"name": str, "folder": str | None, "revision": str | None, "weights": str | None},
    "chat": {"format": str, "human_token_ids": list[int], "model_token_ids": list[int], "content_tokens": list[str],
             "stop_token_id": int | None},
}  # fmt: skip
VIRTUAL_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # peft types of adapters that are embeddings


@dataclass(frozen=True)
class RunResult:
    """A trained model or adapter."""

    folder: Path  # folder of the weights: an output_dir, or a checkpoint in one
    run: dict[str, Any]  # content of run.json
    adapter: str | None  # peft type of the adapter (LORA, PREFIX_TUNING, PROMPT_TUNING, ...), or None for a full model
    is_trained: bool = True  # false for any other model, which has no base to compare with
    trusts_code: bool = (
        False  # --trust_remote_code of this command; what run.json says of the training is no permission
    )

    @property
    def base(self) -> dict[str, Any]:
        """The base model; the keys are those of `finetune.models.loader.ModelInfo.facts`."""
        return self.run["model"]

    def base_path(self, name: str | None = None) -> Path:
        """Return where the base is, `name` if it was moved; one on the hub is not looked for."""
        folder = Path(name or self.base["folder"] or self.base["name"]).expanduser()
        if (name or self.base["folder"]) and not folder.is_dir():
            raise ConfigError(f"{self.folder}: its base {folder} does not exist: give its folder with --base_model")
        return folder

    @property
    def chat(self) -> dict[str, Any]:
        """The chat format: `format`, `stop_token_id` and the fields of `ChatSettings`, not all of them in old runs."""
        return self.run["chat"]

    def with_template_kwargs(self, text: str | None) -> RunResult:
        """The result with other variables for the chat template, a JSON object; None: those of the training."""
        if text is None:
            return self
        return replace(self, run={**self.run, "chat": {**self.chat, "template_kwargs": json.loads(text)}})

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether the adapter puts virtual tokens before each conversation, which shifts token positions."""
        return self.adapter in VIRTUAL_TOKENS

    @property
    def base_bits(self) -> int | None:
        """4 or 8 where training quantized the base."""
        flags = self.run.get("arguments", {})
        return next((bits for bits in (4, 8) if flags.get(f"load_in_{bits}bit")), None)

    @property
    def precision(self) -> Precision:
        """Precision of the training."""
        return self.run["precision"]


def read_result(folder: Path, *, trust_remote_code: bool = False, verify_key: str | None = None) -> RunResult:
    """Read what an output_dir, or a checkpoint in one, holds.

    Args:
        trust_remote_code: its Python files may run.
        verify_key: the environment variable with the key that the manifest of the checkpoint must be of.
    """
    check_is_folder(folder)
    if verify_key is not None:
        raise_faults(verify_checkpoint(folder, key_of(verify_key)), CheckpointError)
    output_dir = folder.absolute().parent if step_of(folder.absolute()) is not None else folder
    run = load_run_json(output_dir)
    missing = [key for key in ("model", "chat", "precision") if key not in run]
    if missing:
        raise ConfigError(f"{output_dir / RUN_FILE}: lacks {' and '.join(missing)}: train again with this version")
    if not holds_model(folder):
        if (folder / COMPLETE_FILE).is_file():
            raise CheckpointError(
                f"{folder}: holds no {' or '.join(MODEL_CONFIGS)}, though its run is complete: copy the whole folder"
            )
        steps = steps_in(output_dir)
        remedy = f"use a checkpoint, the last is {output_dir}/checkpoint-{steps[0]}" if steps else "train first"
        raise ConfigError(f"{folder}: holds no model, because the run has not finished: {remedy}")
    stored_names(folder)  # a truncated file is named now, not when the base is loaded
    adapter = _adapter_type(folder)
    found = [(f"{part}.{name}", run[part].get(name) if isinstance(run[part], dict) else run[part], hint)
             for part in TYPES for name, hint in TYPES[part].items()]  # fmt: skip
    found += [("precision", run["precision"], Precision), ("arguments", run.get("arguments", {}), dict[str, Any])]
    wrong = [f"{output_dir / RUN_FILE}: {name} is {shortened(value)}" for name, value, hint in found
             if not has_type(value, hint)]  # fmt: skip
    raise_faults(wrong, noun="wrong value")
    return RunResult(folder, run, adapter, trusts_code=trust_remote_code)


def _adapter_type(folder: Path) -> str | None:
    """Return the peft type of the adapter in a folder, or None if it holds none."""
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("megatron_config"):  # peft would import the module that the file names
            raise ValueError("an adapter of Megatron")
        kind = config["peft_type"]
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not the config of an adapter: {first_line(error)}") from None
    raise_faults((f"{folder}: {fault}" for fault in adapter_damage(folder, config)), CheckpointError)
    return kind
