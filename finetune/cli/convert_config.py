"""`finetune convert-config`: a config of LLaMA-Factory, axolotl, ms-swift or TRL as a recipe, and what differs."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.config import build_parser as training_parser
from finetune.config.argument_parser import REQUIRED, value_of
from finetune.config.flag_support import REFUSED, WITHOUT_EFFECT
from finetune.config.foreign_names import FOREIGN_NAMES, OURS
from finetune.config.recipes import read_mapping
from finetune.utils.atomic_io import write_new
from finetune.utils.console import print_wrapped
from finetune.utils.options import CommandParser, OptionType, fill, positional

LORA: dict[str, dict[str, Any]] = {
    "lora": {"use_lora": True},
    "qlora": {"use_lora": True, "load_in_4bit": True},
    "full": {},
}
PRECISIONS = {"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": {"bf16": False}, "auto": {}}
FLASH = {"attn_implementation": "flash_attention_2"}
ATTENTION = {"fa2": FLASH, "flash_attn": FLASH, "true": FLASH, "auto": {}, "disabled": {}, "false": {}}
UNUSED = {**REFUSED, **WITHOUT_EFFECT}
# Of values that cannot be said here.
REMEDIES = {
    **UNUSED,
    "dataset": "NAME#500 takes 500 rows there; here --data_path NAME:0.1 takes a tenth of the rows",
    "chat_template": FOREIGN_NAMES["template"],
}
ALL_LINEAR = ("all", "all-linear", "true")


def _flags(table: dict[str, dict[str, Any]], value: Any) -> dict[str, Any] | None:
    return table.get(str(value).lower().removeprefix("torch."))


def _bits(value: Any) -> dict[str, Any] | None:
    return {f"load_in_{value}bit": True, "use_lora": True} if str(value) in ("4", "8") else None


def _names(key: str, value: Any) -> dict[str, Any] | None:
    """Return a list from a list, from text with commas, or from axolotl's list of mappings with a `path`."""
    values = value if isinstance(value, list) else str(value).split(",")
    names = [str(one["path"] if isinstance(one, dict) else one).strip() for one in values]
    if key.endswith("data_path") and any("#" in name for name in names):  # so many rows, in ms-swift
        return None
    return {key: ["all-linear"] if len(names) == 1 and names[0].lower() in ALL_LINEAR else names}


def _share(value: Any) -> dict[str, Any] | None:
    """A share of the conversations; a number of them has no flag here."""
    return {"validation_share": float(value)} if 0 <= float(value) < 1 else None


# Keys whose values change too -> the flags of a value; None where it cannot be said here.
VALUES: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "adapter"), partial(_flags, LORA)),
    **dict.fromkeys(("torch_dtype", "dtype"), partial(_flags, PRECISIONS)),
    **dict.fromkeys(
        ("flash_attn", "flash_attention", "attn_impl"),
        lambda name: ATTENTION.get(str(name).lower(), {"attn_implementation": name}),
    ),
    **dict.fromkeys(("quantization_bit", "quant_bits"), _bits),
    **dict.fromkeys(("dataset", "datasets"), partial(_names, "data_path")),
    **dict.fromkeys(("eval_dataset", "val_dataset", "test_datasets"), partial(_names, "eval_data_path")),
    **dict.fromkeys(("lora_target", "target_modules", "lora_target_modules"), partial(_names, "lora_target_modules")),
    **dict.fromkeys(("additional_target", "lora_modules_to_save"), partial(_names, "modules_to_save")),
    **dict.fromkeys(("val_size", "val_set_size", "split_dataset_ratio"), _share),
    **dict.fromkeys(("packing", "sample_packing", "neat_packing"), lambda on: {"batching": "packed"} if on else {}),
    "lora_target_linear": lambda on: {"lora_target_modules": ["all-linear"]} if on else {},
    "use_peft": lambda on: {"use_lora": True} if on else {},
    "pissa_init": lambda on: {"init_lora_weights": "pissa"} if on else {},
    "mask_history": lambda on: {"train_on": "last_model_turn"} if on else {},
    "new_special_tokens": partial(_names, "new_tokens"),
    **{name: lambda _: None for name in UNUSED},
    "chat_template": lambda name: {"chat_template": name} if re.fullmatch(r"chatml|.*\.jinja", name) else None,
    "bf16": lambda value: {"bf16": str(value).lower() in ("true", "auto")},
}
PROGRAMS = {
    "LLaMA-Factory": ("finetuning_type", "cutoff_len", "lora_target", "stage", "template", "dataset_dir"),
    "axolotl": ("base_model", "sequence_len", "micro_batch_size", "datasets", "sample_packing", "val_set_size"),
    "TRL": ("use_peft", "dataset_name", "dataset_text_field", "assistant_only_loss", "completion_only_loss"),
    "ms-swift": ("train_type", "tuner_type", "target_modules", "split_dataset_ratio", "quant_bits", "attn_impl"),
}
DIFFERENCES = (
    "mask: only answers and their end-of-turn token are supervised here, whatever the config says of prompts",
    "line break after the answer: it is not supervised here; templates of LLaMA-Factory and ms-swift may supervise it",
    "truncation: a long conversation loses whole turns here (--too_long turns), nothing is cut inside a turn",
    "loss: a mean over the supervised tokens of a step, of all ranks; a mean over micro-batches weighs otherwise",
    "data: files, folders and hub names (of ModelScope with modelscope: in front), not names of a dataset_info.json",
    "chat template: the tokenizer's own; `finetune preview` shows each row with its supervised tokens",
    "batch: a step has per_device_train_batch_size x gradient_accumulation_steps x ranks conversations",
)


@dataclass(frozen=True)
class ConvertConfigOptions:
    """Write a config of LLaMA-Factory, axolotl, ms-swift or TRL as a recipe, and list what differs in meaning."""

    file: str = positional("FILE", "its YAML or JSON file")
    recipe: str | None = positional("RECIPE.yaml", "where the recipe goes; default: stdout", None)


build_parser = partial(CommandParser, "finetune convert-config", "FILE [RECIPE.yaml]", ConvertConfigOptions)


def main(argv: Sequence[str]) -> None:
    """Write the recipe, and on stderr what it leaves out and what differs."""
    import yaml

    options = fill(ConvertConfigOptions, build_parser().parse(argv))
    given = read_mapping(Path(options.file), options.file)
    recipe, left_out = convert(given)
    missing = [name for name in REQUIRED if name not in recipe]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    if options.recipe is None:
        print(text, end="")
    else:
        write_new(Path(options.recipe), text)
    notes = [f"reads like {program_of(given)}", *(f"left out: {line}" for line in left_out)]
    notes += [f"missing in the recipe: {', '.join(missing)}"] if missing else []
    for note in [*notes, *DIFFERENCES]:
        print_wrapped(f"convert-config: {note}", sys.stderr)


def program_of(given: dict[str, Any]) -> str:
    """Return whose keys most of these are."""
    counts = {program: sum(key in given for key in keys) for program, keys in PROGRAMS.items()}
    return f"a config of {max(counts, key=counts.__getitem__)}" if any(counts.values()) else "a recipe"


def convert(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags of a recipe, and a line for each key that has none here."""
    types = training_parser().types
    recipe: dict[str, Any] = {}
    left_out: list[str] = []
    for key, value in given.items():
        name = str(key)
        if value is None or value == "":
            continue
        try:
            flags = VALUES[name](value) if name in VALUES else {OURS.get(name, name): value}
        except (LookupError, TypeError, ValueError):
            flags = None
        faults = _faults(flags, types)
        other = [flag for flag, said in (flags or {}).items() if flag in recipe and recipe[flag] != said]
        if flags is None or faults or other:
            known = REMEDIES.get(name) or FOREIGN_NAMES.get(name.lower())
            remedy = known or (*faults, "this value has no flag here")[0]
            if other:
                remedy = f"another key says --{other[0]} {recipe[other[0]]}"
            left_out.append(f"{name}: {value!r:.60}: {remedy}")
            continue
        left_out += [f"{name}.{part}: {said!r:.60}: {FOREIGN_NAMES.get(part, 'unknown here')}"
                     for mapping in (value if isinstance(value, list) else ()) if isinstance(mapping, dict)
                     for part, said in mapping.items() if part != "path"]  # fmt: skip
        recipe |= flags
    return recipe, left_out


def _faults(flags: dict[str, Any] | None, types: dict[str, OptionType]) -> list[str]:
    faults = []
    for name, value in (flags or {}).items():
        if name not in types:
            faults.append("unknown here")
            continue
        try:
            value_of(types[name], value)
        except ValueError as error:
            faults.append(str(error))
    return faults
