"""Names of the same weights in the files of a model and in memory.

Most weights have one name. transformers renames some when it loads them, and joins several into one (the experts of a
layer); it holds the rules and reverts them when it saves (transformers 5, `core_model_loading`).

    files     experts.0.w1, experts.0.w3, experts.1.w1, experts.1.w3    norm.weight
    memory    experts.gate_up_proj                                     norm.weight
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class StoredWeight:
    """Weights in memory and the tensors in files that they are made from: one of each unless there is a converter."""

    files: tuple[tuple[str, str], ...]  # names in the files, each with the pattern that it matched
    weights: tuple[str, ...]  # names in memory
    converter: Any = None  # rule of transformers, or None for a tensor that is the same in both


class WeightNames:
    """Maps the names of one model without an adapter; the values of its weights are not used."""

    def __init__(self, model: Any) -> None:
        self.model, self.rules = model, get_model_conversion_mapping(model) or []
        self.renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]
        self.state = model.state_dict()
        model.get_parameter = self.state.__getitem__  # rules compare shapes, also once an adapter wraps its layers
        self.in_files: dict[str, torch.Tensor] = {}  # weights that are one tensor of the files, empty, as these have it

    def group_files(self, shapes: Mapping[str, Iterable[int]]) -> list[StoredWeight]:
        """Group the tensors of the files (name -> shape) by the weights that they form; unused tensors form none."""
        by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        converted: dict[str, list[tuple[str, str]]] = {}
        groups = []
        for name in sorted(shapes, key=dot_natural_key):
            renamed, pattern = self._renamed(name)
            if pattern is None:
                groups.append(StoredWeight(((name, name),), (renamed,) if renamed in self.state else ()))
            else:
                converted.setdefault(renamed, []).append((name, pattern))
        for first, files in converted.items():
            group = StoredWeight(tuple(files), (first,), by_pattern[files[0][1]])
            empty = {name: torch.empty(tuple(shapes[name]), device="meta") for name, _ in files}
            groups.append(replace(group, weights=tuple(self.weights_of(group, empty.__getitem__))))
            if len(files) == 1:
                self.in_files[first] = empty[files[0][0]]
        # As transformers does when it loads: a rule that these files do not need is not reverted.
        self.model._weight_conversions = [rule for rule in self.rules if rule.was_used()]
        return groups

    def weights_of(self, group: StoredWeight, get: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert the tensors of a group, which `get` returns by name, to weights in memory."""
        if group.converter is None:
            return {weight: get(group.files[0][0]) for weight in group.weights}
        rule = deepcopy(group.converter)
        for name, pattern in group.files:
            rule.add_tensor(group.weights[0], name, pattern, get(name))
        weights = rule.convert(group.weights[0], model=self.model, config=self.model.config)
        return {name: weight[0] if isinstance(weight, list) else weight for name, weight in weights.items()}

    def as_stored(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert weights in memory to tensors of files; all weights of a group or layer at once."""
        with self.layout_of_files(self.model):
            return revert_weight_conversion(self.model, dict(weights))

    @contextmanager
    def layout_of_files(self, model: Any) -> Iterator[None]:
        """Let transformers save `model` in the layout of the files that were grouped.

        It reads the experts of Qwen3-VL-MoE in two layouts, and transposes those whose shape is not the one that the
        model names. When it saves, that is the shape in the files; else it would write the layout of the memory.
        """
        get_parameter, conversions = model.get_parameter, getattr(model, "_weight_conversions", None)
        model.get_parameter = lambda name: self.in_files[name] if name in self.in_files else get_parameter(name)
        model._weight_conversions = getattr(self.model, "_weight_conversions", None)
        try:
            yield
        finally:
            model.get_parameter, model._weight_conversions = get_parameter, conversions

    def _renamed(self, name: str) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        used = [rule.was_used() for rule in self.rules]
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.state)
        if renamed not in self.state and name in self.state:
            renamed, pattern = name, None
        if (
            renamed == name and pattern is None
        ):  # a rule that matched it and left it as it is does not tell how the files name others
            for rule, was_used in zip(self.rules, used, strict=True):
                rule._was_used = was_used
        return renamed, pattern


def by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names grouped by layer; a name outside a layer is a group of its own."""
    layers: dict[str, list[str]] = {}
    for name in names:
        match = LAYER.match(name)
        layers.setdefault(match[1] if match else name, []).append(name)
    yield from layers.values()
