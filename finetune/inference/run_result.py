"""The result of a training run, as the files of its `output_dir` describe it; no weight is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint import step_of, steps_in
from finetune.run_dir.run_json import ADAPTER_CONFIG, RUN_FILE, check_is_folder, holds_model, load_run_json
from finetune.utils.errors import CheckpointError, ConfigError, first_line

VIRTUAL_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING")  # peft's names of these kinds of adapters


@dataclass(frozen=True)
class RunResult:
    """What a training run has left in `folder`, as the files there say; no weight is read.

    Attributes:
        folder: where the weights lie: an output_dir, or a checkpoint in one.
        run: run.json of the output_dir.
        adapter: None for a full model, else peft's name of its kind: LORA, PREFIX_TUNING, PROMPT_TUNING, ...
        is_trained: False for a model that no run of ours has left: it has no base to compare with.
    """

    folder: Path
    run: dict[str, Any]
    adapter: str | None
    is_trained: bool = True

    @property
    def base(self) -> dict[str, Any]:
        """The model that was trained; the keys are those of `model.CheckedModel.facts`."""
        return self.run["model"]

    @property
    def chat(self) -> dict[str, Any]:
        """How conversations were rendered: `format`, `human_token_ids`, `model_token_ids`, `content_tokens`, and
        `stop_token_id`, which ends a model turn."""
        return self.run["chat"]

    @property
    def trusts_code(self) -> bool:
        """Whether the model's own Python files may run: the user of the training said so."""
        return bool(self.base["trusts_code"])

    @property
    def has_virtual_tokens(self) -> bool:
        """Whether the adapter stands in front of each conversation, and so moves the positions of its tokens."""
        return self.adapter in VIRTUAL_TOKENS

    @property
    def precision(self) -> str:
        """In which it was trained: bf16, fp16 or float32."""
        return self.run["precision"]


def read_result(folder: Path) -> RunResult:
    """Find out what an output_dir, or a checkpoint in one, holds.

    Raises:
        ConfigError: no such folder, no run.json, or no model yet; the message says what there is instead.
        CheckpointError: an adapter whose config cannot be read.
    """
    check_is_folder(folder)
    output_dir = folder.absolute().parent if step_of(folder.absolute()) is not None else folder
    run = load_run_json(output_dir)
    missing = [key for key in ("model", "chat", "precision") if key not in run]
    if missing:
        raise ConfigError(f"{output_dir / RUN_FILE}: lacks {' and '.join(missing)}: written by an older version")
    if not holds_model(folder):
        steps = steps_in(output_dir)
        there = (
            f"name one of its checkpoints, the last is {output_dir}/checkpoint-{steps[0]}" if steps else "train first"
        )
        raise ConfigError(f"{folder}: holds no model: the run has not come to its end: {there}")
    return RunResult(folder, run, _adapter_in(folder))


def _adapter_in(folder: Path) -> str | None:
    """peft's name of the kind of adapter that a folder holds; None where it holds none."""
    path = folder / ADAPTER_CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))["peft_type"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not the config of an adapter: {first_line(error)}") from None
