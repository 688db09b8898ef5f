"""Freeze weights by parts of their names, ranges of layers, kinds of modules, or regular expressions."""

import re
from collections.abc import Sequence
from typing import Any

from finetune.models.module_kinds import KINDS, ModuleKinds
from finetune.utils.errors import ConfigError, format_names


def freeze(model: Any, kinds: ModuleKinds, frozen: Sequence[str], trained: Sequence[str]) -> None:
    """Freeze the weights that `frozen` selects, or all but those that `trained` selects; of tied ones both.

    Raises:
        ConfigError: a selection matches no weight, or no weight is left to train.
    """
    if not frozen and not trained:
        return
    flag, selections = ("--freeze", frozen) if frozen else ("--train_only", trained)
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen: set[int] = set()
    for selection in selections:
        matched = [id(weight) for name, weight in named.items() if selects(selection, name, kinds.of(name))]
        if not matched:
            parts = sorted({part for name in named for part in name.split(".")[:-1] if not part.isdigit()})
            present = [kind for kind in KINDS if any(kinds.of(name) == kind for name in named)]
            raise ConfigError(
                f"{flag} {selection}: no weight has this name or kind: parts of names are {', '.join(parts)}; kinds "
                f"are {', '.join(present)}"
            )
        chosen.update(matched)
    for weight in named.values():
        if (id(weight) in chosen) == bool(frozen):
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in named.values()):
        reason = "text does not train what it names" if trained else f"of {format_names([*named])}"
        raise ConfigError(f"{flag} {' '.join(selections)}: no weight is left to train ({reason})")


def selects(selection: str, name: str, kind: str) -> bool:
    """Whether a selection names this parameter, a module around it, or its kind.

    >>> selects("layers.0-11", "model.layers.7.mlp.up_proj.weight", "dense MLP")
    True
    >>> selects("layers.8-.mlp", "model.layers.7.mlp.up_proj.weight", "dense MLP")
    False
    """
    if selection == kind:
        return True
    parts = name.split(".")
    if re.fullmatch(r"[\w.-]+", selection):
        wanted = selection.split(".")
        places = range(len(parts) - len(wanted) + 1)
        return any(all(map(_is_part, wanted, parts[place:])) for place in places)
    try:
        return any(re.fullmatch(selection, ".".join(parts[:count])) for count in range(1, len(parts) + 1))
    except re.error as error:
        raise ConfigError(f"--freeze or --train_only {selection}: no regular expression: {error}") from None


def _is_part(wanted: str, part: str) -> bool:
    limits = re.fullmatch(r"(\d+)-(\d*)", wanted)
    if limits is None or not part.isdigit():
        return wanted == part
    return int(limits[1]) <= int(part) <= int(limits[2] or part)
