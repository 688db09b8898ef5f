"""What a merged model is made of: each tensor under the name that files give it, and how to get it when it is its turn.

Nothing here holds more than a layer. An adapter is merged by peft itself, one layer at a time: the model stands there
without memory for its weights, one layer's weights are put in, merged, taken out, and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.checkpoint import MasterWeights
from finetune.export.stored_tensors import StoredTensors
from finetune.export.weight_names import StoredWeight, WeightNames, by_layer
from finetune.utils.errors import CheckpointError, ConfigError

PREFIX, TOKENS, INNER = "base_model.model.", ".token_adapter", ".base_layer"
# peft's kinds whose product with a weight is a weight; the others stand beside the model when it runs.
MERGED_BY_PEFT = frozenset({"LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3"})
WHY_NOT = {
    "PREFIX_TUNING": "a prefix adapter is keys and values in front of every conversation, not weights of a layer",
    "PROMPT_TUNING": "a prompt adapter is embeddings in front of every conversation, not weights of a layer",
}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged model; `get` makes it: in float32 where it was `computed`, else as it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    get: Callable[[], Any]
    computed: bool = False

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def check_mergeable(kind: str | None) -> None:
    """Refuse adapters that are no weights.

    Raises:
        ConfigError: with the reason.
    """
    if kind is not None and kind not in MERGED_BY_PEFT:
        why = WHY_NOT.get(kind, f"peft's {kind} is not one of {', '.join(sorted(MERGED_BY_PEFT))}")
        raise ConfigError(f"this adapter cannot be merged: {why}; it is used as it is, with peft or `finetune chat`")


def plain_tensors(stored: StoredTensors, model: Any) -> list[OutputTensor]:
    """A full model's tensors, as they are; one that is tied to another is left out where files hold both."""
    tied = _tied(model)
    return [_as_stored(stored, name) for name in stored if tied.get(name) not in stored]


def _tied(model: Any) -> dict[str, str]:
    """Weights that are another one: name -> name of that."""
    return dict(model.all_tied_weights_keys) if model.config.get_text_config().tie_word_embeddings else {}


def _as_stored(stored: StoredTensors, name: str, called: str | None = None) -> OutputTensor:
    return OutputTensor(called or name, tuple(stored.shape(name)), stored.dtype(name), partial(stored.get, name))


def master_tensors(masters: MasterWeights, names: WeightNames) -> list[OutputTensor]:
    """A full model's tensors out of the states of its optimizer, as files name them."""
    import torch

    pieces = []
    for group in by_layer(masters.shapes):
        empty = {name: torch.empty(masters.shapes[name], device="meta") for name in group}
        layer = _Once(partial(_layer, masters, names, group))
        stored = names.as_stored(empty)
        layer.expect(len(stored))
        for name, tensor in stored.items():
            get = partial(layer.take, name)
            pieces.append(OutputTensor(name, tuple(tensor.shape), torch.float32, get, computed=True))
    for name, tensor in masters.buffers.items():
        if name in names.state:
            pieces.append(OutputTensor(name, tuple(tensor.shape), tensor.dtype, partial(_same, tensor)))
    return pieces


def _same(tensor: Any) -> Any:
    return tensor


def _layer(masters: MasterWeights, names: WeightNames, group: list[str]) -> dict[str, Any]:
    return names.as_stored({name: masters.get(name) for name in group})


class _Once:
    """Several tensors that are made together: made when the first is taken, forgotten with the last."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self.make = make
        self.made: dict[str, Any] | None = None
        self.left = 0

    def expect(self, count: int) -> None:
        """How many will be taken."""
        self.left = count

    def take(self, name: str) -> Any:
        """One of them."""
        self.made = self.made or self.make()
        tensor = self.made[name]
        self.left -= 1
        if not self.left:
            self.made = None
        return tensor


@dataclass(frozen=True)
class _Change:
    """A weight that the adapter changes: `get` takes it out of its merged layer, `again` merges for it alone."""

    shape: tuple[int, ...]
    get: Callable[[], Any]
    again: Callable[[], Any]


class MergedTensors:
    """An adapter in its base: the base's tensors as they are, but for those that the adapter changes.

    Args:
        stored: the base's.
        model: the base without memory for its weights, its vocabulary as large as the trained one's.
        folder: of the adapter.
        attach: puts the adapter on the model.

    Attributes:
        unties: whether embeddings and head, one tensor in the base, are two now.

    Raises:
        CheckpointError: the adapter is of another size, or changes a weight that the base's files do not hold.
    """

    def __init__(self, stored: StoredTensors, model: Any, folder: Path, attach: Callable[[Any, Path], Any]) -> None:
        self.stored, self.names = stored, WeightNames(model)
        self.tied = _tied(model)
        self.places = self.names.places({name: stored.shape(name) for name in stored})
        self.place_of = {weight: place for place in self.places for weight in place.weights}
        self.changed = dict(self._changes(attach(model, folder)))
        lost = [one for one in self.changed if one not in self.place_of and self.tied.get(one) not in self.place_of]
        if lost:
            raise CheckpointError(f"{folder}: the adapter changes {lost[0]}, which its base does not have")
        self.unties = self._unties()

    def pieces(self) -> list[OutputTensor]:
        """All tensors of the merged model, under the names of the base's files."""
        found = [piece for place in self.places for piece in self._of_place(place)]
        if not self.unties:
            return found
        # What was one tensor in the files becomes two.
        for name, partner in self.tied.items():
            if name in self.place_of:
                continue
            if name in self.changed:
                found.append(self._computed(name, name))
            else:
                found.append(_as_stored(self.stored, self.place_of[partner].files[0][0], called=name))
        return found

    def _of_place(self, place: StoredWeight) -> list[OutputTensor]:
        if not self.changed.keys() & set(place.weights):
            return [_as_stored(self.stored, name) for name, _ in place.files]
        if place.converter is None:
            return [self._computed(place.files[0][0], place.weights[0])]
        together = _Once(partial(self._converted_back, place))
        together.expect(len(place.files))
        return [
            OutputTensor(name, tuple(self.stored.shape(name)), _float32(), partial(together.take, name), computed=True)
            for name, _ in place.files
        ]

    def _computed(self, name: str, weight: str) -> OutputTensor:
        return OutputTensor(name, self.changed[weight].shape, _float32(), self.changed[weight].get, computed=True)

    def _converted_back(self, place: StoredWeight) -> dict[str, Any]:
        weights = self.names.weights_of(place, self.stored.get)
        changed = {name: self.changed[name].get() if name in self.changed else weights[name] for name in weights}
        return self.names.as_stored(changed)

    def _changes(self, adapted: Any) -> Iterator[tuple[str, _Change]]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        for path, module in adapted.named_modules():
            name = path.removeprefix(PREFIX).removesuffix(TOKENS).replace(INNER, "")
            if isinstance(module, ModulesToSaveWrapper):
                whole = module.modules_to_save[module.active_adapters[0]]
                for part, tensor in whole.named_parameters():
                    yield f"{name}.{part}", _Change(tuple(tensor.shape), tensor.detach, tensor.detach)
            elif isinstance(module, BaseTunerLayer) and module.active_adapters:
                parts = _parts_of(module)
                layer = _Once(partial(self._merged, name, module))
                layer.expect(len(parts))
                for part, tensor in parts.items():
                    again = partial(self._part, name, module, part)
                    yield f"{name}.{part}", _Change(tuple(tensor.shape), partial(layer.take, part), again)

    def _part(self, name: str, module: Any, part: str) -> Any:
        return self._merged(name, module)[part]

    def _merged(self, name: str, module: Any) -> dict[str, Any]:
        """The parameters of one layer with the adapter in them, in float32."""
        import torch

        base, parts = module.get_base_layer(), _parts_of(module)
        for part, empty in parts.items():
            value = self._base_value(f"{name}.{part}").to(torch.float32)
            if value.shape != empty.shape:  # rows of new tokens
                whole = torch.zeros(empty.shape)
                whole[tuple(map(slice, value.shape))] = value
                value = whole
            setattr(base, part, torch.nn.Parameter(value, requires_grad=False))
        module.float()
        module.merge(safe_merge=True)
        module.merged_adapters.clear()
        merged = {part: getattr(base, part).detach() for part in parts}
        for part, empty in parts.items():
            setattr(base, part, empty)
        return merged

    def _base_value(self, name: str) -> Any:
        name = name if name in self.place_of else self.tied[name]
        return self.names.weights_of(self.place_of[name], self.stored.get)[name]

    def _unties(self) -> bool:
        """Whether a tied pair is changed on one side alone, or differently."""
        import torch

        for name, partner in self.tied.items():
            sides = [one for one in (name, partner) if one in self.changed]
            if len(sides) == 1:
                return True
            if len(sides) == 2 and not torch.equal(*(self.changed[side].again() for side in sides)):
                return True
        return False


def _parts_of(module: Any) -> dict[str, Any]:
    """The parameters that a layer of peft's changes: one of its own choice, or all of the layer that it wraps."""
    base = module.get_base_layer()
    chosen = getattr(module, "parameter_name", None)
    return {chosen: getattr(base, chosen)} if chosen else dict(base.named_parameters(recurse=False))


def _float32() -> Any:
    import torch

    return torch.float32
