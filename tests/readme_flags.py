"""The table of flags in README.md, out of the flags themselves: `python tests/readme_flags.py` writes it."""

from __future__ import annotations

import sys
import typing
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, this folder alone would be looked into

from finetune.arguments.flags import GROUPS, TRAINING_HELP  # noqa: E402
from finetune.arguments.parsing import meaning, meaning_of  # noqa: E402
from finetune.arguments.training import TRANSLATED  # noqa: E402

HEAD = "| flag | meaning |"
TRAINING = (
    "all flags of `transformers.TrainingArguments`, `--learning_rate`, `--num_train_epochs`, `--logging_steps`, "
    "`--save_strategy` and `--seed` among them; those that mean more here, or have another default, see "
    "[ds_configs/](ds_configs/README.md), [Hardware](#hardware), [Checkpoints](#checkpoints), [Trackers](#trackers):"
)
# The sections that say more, by the headings of the groups.
SECTIONS = {
    "The model": ["Hardware", "What is trusted"],
    "The data": ["The data", "Is it better?"],
    "The batches": ["Batches"],
    "Adapters; without one all parameters are trained": ["Adapters"],
    "The run": ["Checkpoints", "Numbers", "When a run ends early", "The report"],
}


def table() -> str:
    """The whole table, without a newline at its end."""
    lines = [HEAD, "| --- | --- |"]
    for group in GROUPS:
        title, hints = group.__doc__.rstrip("."), typing.get_type_hints(group)
        links = ", ".join(f"[{name}](#{anchor(name)})" for name in SECTIONS[title])
        lines.append(f"| **{title}** | see {links} |")
        for one in fields(group):
            choices = [choice for choice in choices_of(hints[one.name]) if f"`{choice}`" not in one.metadata["help"]]
            named = ", ".join(f"`{choice}`" for choice in choices)
            lines.append(f"| `--{one.name}` | {named + ': ' if named else ''}{meaning_of(one)} |")
    lines.append(f"| **Training** | {TRAINING} |")
    lines += [f"| `--{name}` | {meaning(name)} |" for name in TRAINING_HELP]
    renamed = ", ".join(f"`--{name}`" for name in TRANSLATED)
    lines.append(f"| {renamed} | names that transformers has changed; they still work |")
    return "\n".join(lines)


def choices_of(hint: object) -> list[str]:
    """Of `Literal["a", "b"] | None`: a, b."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for part in typing.get_args(hint) for choice in choices_of(part)]


def anchor(heading: str) -> str:
    """As GitHub links to it."""
    return "".join(letter for letter in heading.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def place(page: str) -> slice:
    """Where the table is in README.md."""
    begin = page.index(HEAD)
    return slice(begin, page.index("\n\n", begin))


if __name__ == "__main__":
    path = ROOT / "README.md"
    page = path.read_text(encoding="utf-8")
    path.write_text(page[: place(page).start] + table() + page[place(page).stop :], encoding="utf-8")
