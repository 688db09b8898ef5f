"""How the files of a model and the model in memory hold the same weights.

For most weights both are alike. transformers renames some when it loads them, and makes one weight of several (the
experts of a layer); it keeps the rules itself, and undoes them when it saves (transformers 5, `core_model_loading`).

    files     experts.0.w1, experts.0.w3, experts.1.w1, experts.1.w3    norm.weight
    memory    experts.gate_up_proj                                     norm.weight
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class StoredWeight:
    """Weights in memory and the tensors of the files that they are made of; both one, where nothing is converted.

    Attributes:
        files: names in the files, each with the pattern that it matched.
        weights: names in memory.
        converter: transformers' rule, None where the tensor is the same.
    """

    files: tuple[tuple[str, str], ...]
    weights: tuple[str, ...]
    converter: Any = None


class WeightNames:
    """Of one model's weights.

    Args:
        model: without an adapter; its weights are not looked at.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model) or []
        self.model = model
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.state = model.state_dict()

    def places(self, shapes: Mapping[str, Iterable[int]]) -> list[StoredWeight]:
        """Every tensor of the files (name -> shape) in its place; what the model has no weight for is in a place that
        makes none."""
        import torch
        from transformers.core_model_loading import dot_natural_key

        by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        found: dict[str, list[tuple[str, str]]] = {}
        plain = []
        for name in sorted(shapes, key=dot_natural_key):
            renamed, pattern = self._renamed(name)
            if pattern is None:
                plain.append(StoredWeight(((name, name),), (renamed,) if renamed in self.state else ()))
            else:
                found.setdefault(renamed, []).append((name, pattern))
        converted = []
        for first, files in found.items():
            place = StoredWeight(tuple(files), (first,), by_pattern[files[0][1]])
            empty = {name: torch.empty(tuple(shapes[name]), device="meta") for name, _ in files}
            converted.append(
                StoredWeight(place.files, tuple(self.weights_of(place, empty.__getitem__)), place.converter)
            )
        return plain + converted

    def weights_of(self, place: StoredWeight, get: Callable[[str], Any]) -> dict[str, Any]:
        """The weights of a place, out of the files' tensors that `get` returns by name."""
        if place.converter is None:
            return {weight: get(place.files[0][0]) for weight in place.weights}
        rule = deepcopy(place.converter)
        for name, pattern in place.files:
            rule.add_tensor(place.weights[0], name, pattern, get(name))
        made = rule.convert(place.weights[0], model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def as_stored(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Weights by their names in memory -> as files hold them; give all of a place, or of a layer, at once."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, dict(weights))

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.state)
        if renamed not in self.state and name in self.state:
            return name, None
        return renamed, pattern


def by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """Names in groups: those of a layer together, each other one alone."""

    def key(name: str) -> str:
        match = LAYER.match(name)
        return match[1] if match else name

    ordered = list(names)
    place = {one: number for number, one in reversed(list(enumerate(map(key, ordered))))}
    for _, group in groupby(sorted(ordered, key=lambda name: place[key(name)]), key):
        yield list(group)
