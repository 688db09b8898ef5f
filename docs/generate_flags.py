"""Write docs/reference/flags.md from the flag dataclasses: `python docs/generate_flags.py` (`make docs` runs it)."""

from __future__ import annotations

import sys
import typing
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.cli import chat, evaluate, merge, preview, push, quickstart, report  # noqa: E402
from finetune.config.argument_parser import meaning  # noqa: E402
from finetune.config.arguments import GROUPS, TRAINING_HELP, TRANSLATED, DoctorArguments  # noqa: E402
from finetune.utils.options import default_of_field, describe  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "flags.md"
INTRODUCTION = """\
# Flags

<!-- Written by docs/generate_flags.py. Edit the help texts in the dataclasses. -->

Flags of the training command. Defaults are in brackets. `finetune train --help` lists the same, together with all flags
of `transformers.TrainingArguments`, which are accepted under their own names.

`finetune train [RECIPE.yaml] [--flag VALUE | flag=VALUE ...]`: a recipe is a YAML or JSON file of flags, like
`--config FILE`; the command line wins. A switch alone (`--bf16`) means True. Flags of the launcher (`--num_gpus`,
`--hostfile`, `--max_restarts`) may stand anywhere. `deepspeed finetune/finetune.py` takes the same, launcher flags in
front.
"""
TRAINING = """\
## Training

All flags of `transformers.TrainingArguments` are accepted, `--learning_rate`, `--num_train_epochs`, `--save_strategy`
and `--seed` among them. These have another default or mean more here:
"""
RENAMED = """\
## Old names

Names that transformers has changed still work:
"""


def names(flags: typing.Iterable[str]) -> str:
    """Write flags as `--one`, `--two`."""
    return ", ".join(f"`--{flag}`" for flag in flags)


VERBS = {
    "finetune preview": (
        "Also takes `--config` and the flags of the model and the data, without "
        f"{names(sorted(preview.NOT_OF_PREVIEW))}.",
        preview.PreviewOptions,
    ),
    "finetune doctor": ("Takes the whole training command line, launcher flags included.", DoctorArguments),
    "finetune evaluate OUTPUT": (
        f"Also takes these flags of the data: {names(evaluate.FLAGS_OF_DATA)}.",
        evaluate.EvaluateOptions,
    ),
    "finetune chat OUTPUT": ("OUTPUT is a result or any chat model.", chat.ChatOptions),
    "finetune merge OUTPUT [DIR]": ("DIR is where the model goes.", merge.MergeOptions),
    "finetune push OUTPUT REPO": ("REPO is owner/name on the Hugging Face hub.", push.PushOptions),
    "finetune report OUTPUT ...": ("Several results share one page.", report.ReportOptions),
    "finetune quickstart": ("Needs no model hub.", quickstart.QuickstartOptions),
}


def flags_page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    for group in GROUPS:
        parts += [f"## {group.__doc__.rstrip('.')}\n", flags_table(group)]
    parts += [TRAINING, table((name, meaning(name)) for name in TRAINING_HELP)]
    parts += [RENAMED, table((name, f"now `--{new.to}`") for name, new in TRANSLATED.items())]
    for verb, (remark, group) in VERBS.items():
        parts += [f"## `{verb}`\n", f"{remark}\n", flags_table(group)]
    return "\n".join(parts)


def flags_table(group: type) -> str:
    """Return a Markdown table with one row per field of a flag dataclass."""
    hints = typing.get_type_hints(group)
    rows = []
    for flag in (flag for flag in fields(group) if "metavar" not in flag.metadata):
        text = describe(flag.metadata["help"], default_of_field(flag))
        unnamed = [f"`{choice}`" for choice in choices_of(hints[flag.name]) if f"`{choice}`" not in text]
        rows.append((flag.name, ": ".join(filter(None, [", ".join(unnamed), text]))))
    return table(rows)


def table(rows: typing.Iterable[tuple[str, str]]) -> str:
    """Return a Markdown table of (flag name, meaning) rows."""
    lines = ["| flag | meaning |", "| --- | --- |"]
    lines += [f"| `--{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return "\n".join(lines) + "\n"


def choices_of(hint: object) -> list[str]:
    """Return the choices of a type hint: `Literal["a", "b"] | None` -> ["a", "b"]."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for part in typing.get_args(hint) for choice in choices_of(part)]


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
