"""The tensors of a merged model: each under its name in the files, with a function that computes it when needed.

No more than one layer is in memory. peft itself merges an adapter, layer by layer: the model has no memory for its
weights; the weights of one layer are put in, merged, taken out and freed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from finetune.checkpoint import MasterWeights
from finetune.export.weight_names import StoredWeight, WeightNames, by_layer
from finetune.models.stored_tensors import StoredTensors
from finetune.utils.errors import CheckpointError, ConfigError

# Parts of module names in a PeftModel.
PREFIX, TOKEN_ADAPTER, BASE_LAYER = "base_model.model.", ".token_adapter", ".base_layer"
# peft types that are no weights of a layer, or whose weights peft computes from more than the layer.
NOT_MERGEABLE = {
    "PREFIX_TUNING": "a prefix adapter is keys and values before every conversation, not weights of a layer",
    **dict.fromkeys(
        ("PROMPT_TUNING", "P_TUNING"),
        "a prompt adapter is embeddings before every conversation, not weights of a layer",
    ),
    **dict.fromkeys(
        ("ADAMSS", "FROD", "OSF", "PSOFT"), "it is computed from the weights of its base when it is loaded"
    ),
    **dict.fromkeys(("BEFT", "LILY", "LN_TUNING"), "peft does not merge it layer by layer"),
}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the merged model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], torch.Tensor]  # computes the tensor: in float32 if it is `computed`, else as stored
    computed: bool = False

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def check_mergeable(adapter: str | None) -> None:
    """Check that an adapter of this peft type can be merged."""
    if reason := NOT_MERGEABLE.get(adapter or ""):
        raise ConfigError(f"this adapter cannot be merged: {reason}. Use it as it is, with peft or `finetune chat`")


def plain_tensors(stored: StoredTensors, model: Any) -> list[OutputTensor]:
    """Return the tensors of a full model, unchanged; of tied tensors only one if the files hold both."""
    shared_by = model.all_tied_weights_keys
    return [_unchanged(stored, name) for name in stored if shared_by.get(name) not in stored]


def _unchanged(stored: StoredTensors, name: str, output_name: str | None = None) -> OutputTensor:
    tensor = stored[name]
    return OutputTensor(output_name or name, tuple(tensor.shape), tensor.dtype, partial(stored.__getitem__, name))


def master_tensors(masters: MasterWeights, names: WeightNames, stored: StoredTensors | None) -> list[OutputTensor]:
    """Return the tensors of a full model from the float32 weights in its optimizer states.

    Args:
        stored: files with what was not trained: frozen weights, and tensors that the model's code does not load.
    """
    outputs = []
    for group in by_layer(masters.shapes):
        shapes = names.as_stored({name: torch.empty(masters.shapes[name], device="meta") for name in group})
        get_all = partial(lambda group: names.as_stored({name: masters.get(name) for name in group}), group)
        layer = _ComputedTogether(get_all, len(shapes))
        for name, tensor in shapes.items():
            get = partial(layer.take, name)
            outputs.append(OutputTensor(name, tuple(tensor.shape), torch.float32, get, computed=True))
    for name, buffer in masters.buffers.items():
        if name in names.state:
            outputs.append(OutputTensor(name, tuple(buffer.shape), buffer.dtype, buffer.detach))
    trained = {output.name for output in outputs}
    of_files = plain_tensors(stored, names.model) if stored is not None else []
    return outputs + [output for output in of_files if output.name not in trained]


class _ComputedTogether:
    """Tensors that are computed together: when the first is taken; they are freed with the last."""

    def __init__(self, compute: Callable[[], dict[str, torch.Tensor]], count: int) -> None:
        self.compute = compute
        self.remaining = count
        self.tensors: dict[str, torch.Tensor] | None = None

    def take(self, name: str) -> torch.Tensor:
        """Return one of the tensors; each can be taken once."""
        self.tensors = self.tensors or self.compute()
        tensor = self.tensors[name]
        self.remaining -= 1
        if not self.remaining:
            self.tensors = None
        return tensor


@dataclass(frozen=True)
class _ChangedWeight:
    """A weight that the adapter changes."""

    shape: tuple[int, ...]
    take: Callable[[], torch.Tensor]  # takes the weight out of its merged layer, once
    recompute: Callable[[], torch.Tensor]  # merges the layer for this weight alone


class MergedTensors:
    """The tensors of a base with the adapter in `folder` merged into it; those that it does not change are copied.

    `model` is the base without memory for its weights, its vocabulary as large as that of the training;
    `attach` loads the adapter on it. `unties`: embeddings and head, one tensor in the base, become two.
    """

    def __init__(self, stored: StoredTensors, model: Any, folder: Path, attach: Callable[[Any, Path], Any]) -> None:
        self.stored, self.names = stored, WeightNames(model)
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)  # name of a weight -> the weight that it shares
        self.groups = self.names.group_files(stored.shapes())
        self.group_of = {weight: group for group in self.groups for weight in group.weights}
        self.changed = dict(self._changed_weights(attach(model, folder)))
        for name in self.changed:
            if name not in self.group_of and self.tied.get(name) not in self.group_of:
                raise CheckpointError(f"{folder}: the adapter changes {name}, which its base does not have")
        self.unties = self._unties()

    def outputs(self) -> list[OutputTensor]:
        """Return all tensors of the merged model, under the names of the base's files."""
        outputs = [output for group in self.groups for output in self._outputs_of(group)]
        if not self.unties:
            return outputs
        for name, shared in self.tied.items():  # one tensor of the files becomes two
            if name in self.group_of:
                continue
            if name in self.changed:
                outputs.append(self._computed(name, name))
            else:
                outputs.append(_unchanged(self.stored, self.group_of[shared].files[0][0], name))
        return outputs

    def _outputs_of(self, group: StoredWeight) -> list[OutputTensor]:
        if not self.changed.keys() & set(group.weights):
            return [_unchanged(self.stored, name) for name, _ in group.files]
        if group.converter is None:
            return [self._computed(group.files[0][0], group.weights[0])]
        tensors = _ComputedTogether(partial(self._stored_group, group), len(group.files))
        return [
            OutputTensor(name, self.stored.shape(name), torch.float32, partial(tensors.take, name), True)
            for name, _ in group.files
        ]

    def _computed(self, name: str, weight: str) -> OutputTensor:
        changed = self.changed[weight]
        return OutputTensor(name, changed.shape, torch.float32, changed.take, computed=True)

    def _stored_group(self, group: StoredWeight) -> dict[str, torch.Tensor]:
        weights = self.names.weights_of(group, self.stored.__getitem__)
        return self.names.as_stored(
            {name: self.changed[name].take() if name in self.changed else weights[name] for name in weights}
        )

    def _changed_weights(self, adapted: Any) -> Iterator[tuple[str, _ChangedWeight]]:
        for path, module in adapted.named_modules():
            name = path.removeprefix(PREFIX).removesuffix(TOKEN_ADAPTER).replace(BASE_LAYER, "")
            if isinstance(module, ModulesToSaveWrapper):
                trained: Any = module.modules_to_save[module.active_adapters[0]]
                for parameter, tensor in trained.named_parameters():
                    yield f"{name}.{parameter}", _ChangedWeight(tuple(tensor.shape), tensor.detach, tensor.detach)
            elif isinstance(module, BaseTunerLayer) and module.active_adapters:
                parameters = _adapted_parameters(module)
                layer = _ComputedTogether(partial(self._merged, name, module), len(parameters))
                for parameter, tensor in parameters.items():
                    recompute = partial(self._merged_parameter, name, module, parameter)
                    changed = _ChangedWeight(tuple(tensor.shape), partial(layer.take, parameter), recompute)
                    yield f"{name}.{parameter}", changed

    def _merged_parameter(self, name: str, module: Any, parameter: str) -> torch.Tensor:
        return self._merged(name, module)[parameter]

    def _merged(self, name: str, module: Any) -> dict[str, torch.Tensor]:
        """Return the parameters of one layer with the adapter merged, in float32."""
        layer, parameters = module.get_base_layer(), _adapted_parameters(module)
        for parameter, empty in parameters.items():
            value = self._base_value(f"{name}.{parameter}").to(torch.float32)
            if value.shape != empty.shape:  # rows of new tokens
                padded = torch.zeros(empty.shape)
                padded[tuple(map(slice, value.shape))] = value
                value = padded
            setattr(layer, parameter, torch.nn.Parameter(value, requires_grad=False))
        module.float()
        module.merge(safe_merge=True)
        module.merged_adapters.clear()
        merged = {parameter: getattr(layer, parameter).detach() for parameter in parameters}
        for parameter, empty in parameters.items():
            setattr(layer, parameter, empty)
        return merged

    def _base_value(self, name: str) -> torch.Tensor:
        name = name if name in self.group_of else self.tied[name]
        return self.names.weights_of(self.group_of[name], self.stored.__getitem__)[name]

    def _unties(self) -> bool:
        """Whether the two weights of a tied pair differ after merging."""
        for pair in self.tied.items():
            changed = [self.changed[name] for name in pair if name in self.changed]
            if len(changed) == 1 or (changed and not torch.equal(*(weight.recompute() for weight in changed))):
                return True
        return False


def _adapted_parameters(module: Any) -> dict[str, Any]:
    """Return the parameters that a peft layer changes: the one it names, or all of the wrapped layer."""
    layer = module.get_base_layer()
    name = getattr(module, "parameter_name", None)
    return {name: getattr(layer, name)} if name else dict(layer.named_parameters(recurse=False))
