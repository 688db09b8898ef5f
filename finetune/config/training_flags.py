"""The flags of `transformers.TrainingArguments`, read without importing it, and those it has renamed."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.utils.errors import ConfigError


@dataclass(frozen=True)
class Translated:
    """A flag that transformers had once: its new name, and the new value where it is not the old one."""

    type: type
    to: str
    values: Callable[[Any], Any] = lambda value: value


TRANSLATED = {
    "warmup_ratio": Translated(float, "warmup_steps"),  # a share of all steps when below 1
    "gradient_checkpointing": Translated(bool, "activation_checkpointing"),
    "gradient_checkpointing_kwargs": Translated(str, "activation_checkpointing_kwargs"),
    "group_by_length": Translated(bool, "train_sampling_strategy", lambda on: "group_by_length" if on else "random"),
    "evaluation_strategy": Translated(str, "eval_strategy"),
    "no_cuda": Translated(bool, "use_cpu"),
    "per_gpu_train_batch_size": Translated(int, "per_device_train_batch_size"),
}


@dataclass(frozen=True)
class TrainingFlag:
    """A field of `TrainingArguments` as its source declares it; `default` is None where it is computed there."""

    name: str
    kind: type
    is_list: bool
    default: Any
    help: str


@cache
def training_flags() -> dict[str, TrainingFlag]:
    """The fields of the installed `transformers.TrainingArguments`, read from its source with `ast`."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("transformers is not installed: pip install -r requirements.txt")
    source = Path(spec.submodule_search_locations[0], "training_args.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    declared = [node for node in body if isinstance(node, ast.AnnAssign)]
    flags = [_training_flag(node, node.value) for node in declared if isinstance(node.value, ast.Call)]
    return {flag.name: flag for flag in flags}


def _training_flag(node: ast.AnnAssign, field_call: ast.Call) -> TrainingFlag:
    kinds = {part.strip() for part in ast.unparse(node.annotation).split("|")}
    kind: type = next((kind for kind in (bool, int, float) if kind.__name__ in kinds), str)
    keywords = {keyword.arg: keyword.value for keyword in field_call.keywords}
    metadata = _literal(keywords.get("metadata")) or {}
    if "str" in kinds and kind is bool:
        kind = str
    name, default = ast.unparse(node.target), _literal(keywords.get("default"))
    return TrainingFlag(name, kind, "list[str]" in kinds, default, metadata.get("help", ""))


def _literal(node: ast.AST | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
