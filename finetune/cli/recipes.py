"""`finetune recipes`: list the recipes that come with this project, or copy one to change it.

finetune recipes                     # names, and what each is for
finetune recipes qwen3_8b_lora       # to qwen3_8b_lora.yaml here
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.config.recipes import RECIPE_ENDINGS, find_recipe, shipped_recipes
from finetune.utils.atomic_io import write_new
from finetune.utils.console import accept_all_characters, print_wrapped
from finetune.utils.errors import ConfigError
from finetune.utils.options import CommandParser, fill, positional
from finetune.utils.user_files import read_text


@dataclass(frozen=True)
class RecipesOptions:
    """List the recipes that come with this project, or copy one; an existing file is never replaced."""

    name: str | None = positional("NAME", "the recipe to copy; default: list them all", None)
    target: str | None = positional("FILE", "where it goes; default: NAME.yaml", None)


build_parser = partial(CommandParser, "finetune recipes", "[NAME [FILE]]", RecipesOptions)


def main(argv: Sequence[str]) -> None:
    """List the recipes, or copy one."""
    options = fill(RecipesOptions, build_parser().parse(argv))
    accept_all_characters()
    if options.name is None:
        for name, path in shipped_recipes().items():
            print_wrapped(f"{name:<24} {read_text(path).splitlines()[0].removeprefix('# ')}", sys.stdout)
        print("\nTrain: finetune train NAME --data_path my.jsonl --output_dir output\nCopy one: finetune recipes NAME")
        return
    text = read_text(find_recipe(options.name.removesuffix(".yaml")))
    file_name = f"{options.name.removesuffix('.yaml')}.yaml"
    target = Path(options.target or file_name)
    if target.suffix not in RECIPE_ENDINGS:
        raise ConfigError(f"{target}: a recipe ends with .yaml: name the file, such as {target / file_name}")
    write_new(target, text)
    print(f"Wrote {target}. Train: finetune train {target} --data_path my.jsonl --output_dir output")
