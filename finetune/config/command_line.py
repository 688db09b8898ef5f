"""What is typed behind `finetune train` or `finetune doctor`: a recipe, `--flag value`, and `flag=value`."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from finetune.config.recipes import recipe_path
from finetune.launcher import launcher_options
from finetune.utils.errors import ConfigError
from finetune.utils.options import BOOLEANS, OptionType

SCRIPT, MODULE = "finetune/finetune.py", "finetune.train"
UNKNOWN = OptionType(str)  # a flag that is refused later: what follows it is no recipe


def split_command(
    argv: Sequence[str], types: Mapping[str, OptionType], own_names: Collection[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """Split a command into the words of a verb's own flags, those of the launcher, and those of the training.

    The script may stand between the last two, as it does for `deepspeed`, or be left out: a launcher's flag is then
    told from one of the training by its name, and a name that both know is the training's.

    Args:
        types: the flags of the training, by name without dashes.
    """
    options, words = launcher_options(), list(argv)
    is_script = [word in (MODULE, "finetune.py") or word.endswith("/finetune.py") for word in words]
    script = is_script.index(True) if any(is_script) else None
    ours: list[str] = []
    launcher: list[str] = []
    training: list[str] = []
    place = 0
    while place < len(words):
        name, equals, _ = words[place].partition("=")
        if script is None and equals and f"--{name}" in options:
            words[place], name = f"--{words[place]}", f"--{name}"
        plain, following = name.removeprefix("--"), (words[place + 1 :] or [""])[0]
        if plain in own_names and name != plain:
            target = ours
            takes_value = not equals and following.lower() in BOOLEANS
        elif script is not None:
            target, takes_value = (launcher if place < script else training), False
        else:
            is_launcher = name in options and plain not in types
            target = launcher if is_launcher else training
            takes_value = is_launcher and options[name] and not equals
            if takes_value and (place + 1 == len(words) or following.startswith("--")):
                raise ConfigError(f"{name}: a value is missing behind it")
        if place != script:
            target += words[place : place + 1 + takes_value]
        place += 1 + takes_value
    if "--module" in launcher:
        launcher.remove("--module")
    return ours, launcher, as_flags(training, types)


def as_flags(words: Sequence[str], types: Mapping[str, OptionType]) -> list[str]:
    """Return the words with `flag=value` as `--flag=value`, and a recipe as `--config`.

    >>> as_flags(["a.yaml", "seed=3", "--bf16", "--run_name", "a=b"], {"run_name": OptionType(str)})
    ['--config=a.yaml', '--seed=3', '--bf16', '--run_name', 'a=b']
    """
    result: list[str] = []
    flag: OptionType | None = None  # whose values follow
    for word in words:
        name, equals, value = word.partition("=")
        is_list = flag is not None and flag.is_list
        if re.match(r"--\S|-[A-Za-z]", word):
            flag = None if equals else types.get(word.removeprefix("--"), UNKNOWN)
        elif flag is not None and not is_list and (flag.kind is not bool or word.lower() in BOOLEANS):
            flag = None
        elif equals and (name in types or (name.isidentifier() and not is_list)):
            flag = types.get(name)
            if flag is not None and flag.is_list:
                result.append(f"--{name}")
                word = value
            else:
                flag, word = None, f"--{word}"
        elif not is_list and (recipe := recipe_path(word)):
            flag, word = None, f"--config={recipe}"
        result.append(word)
    return result


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags by name as the words of a command line; None is left out.

    >>> flag_words({"use_lora": True, "data_path": ["a.json", "b.json"], "seed": None})
    ['--use_lora=True', '--data_path', 'a.json', 'b.json']
    """
    words = []
    for name, value in flags.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
