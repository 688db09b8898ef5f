"""Nothing of the base is lost: tensors that training leaves alone are copied from its files, byte for byte.

Those are the weights of frozen modules (a vision tower) and tensors that the model's code does not load (heads for
multi-token prediction). What is trained comes from memory; together they have the names of the base.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from finetune.export.weight_names import WeightNames
from finetune.models.base_checks import COMPUTED_BUFFERS
from finetune.models.model_folder import weight_map
from finetune.models.stored_tensors import StoredTensors, save_tensors
from finetune.utils.errors import CheckpointError, format_names

SHARD_BYTES = 5 << 30


class BaseTensors:
    """The tensors in the files of a base model, and which of them the training of `model`, all of it, leaves alone."""

    def __init__(self, folder: Path, empty: Any, model: Any) -> None:
        self.stored = StoredTensors(folder)
        weights = dict(model.named_parameters(remove_duplicate=False))  # also those that share one
        frozen = {name for name, parameter in weights.items() if not parameter.requires_grad}
        tied = dict(getattr(empty, "all_tied_weights_keys", None) or {})
        self.names = WeightNames(empty)
        groups = self.names.group_files(self.stored.shapes())
        self.tied = {name for group in groups for name, _ in group.files if set(group.weights) & tied.keys()}
        loaded = weights.keys() - frozen | {name for name, _ in model.named_buffers()}
        self.weights_of = {name: group.weights for group in groups for name, _ in group.files}
        self.untouched = [
            name
            for name, weights in self.weights_of.items()
            if not loaded & set(weights) and not COMPUTED_BUFFERS.search(name)
        ]
        copied = {weight for name in self.untouched for weight in self.weights_of[name]}
        self.frozen = {name for name in frozen if name in copied or tied.get(name) in copied}

    def without_frozen(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return what of a state is saved from memory: all but frozen weights that the files of the base hold."""
        return {name: tensor for name, tensor in state.items() if name not in self.frozen}

    def save(self, model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Save a trained model whose tensors have the names and shapes of the base; those left alone are its own.

        Args:
            state: weights of the model; None: those in it.
        """
        with self.names.layout_of_files(model):
            model.save_pretrained(folder, state_dict=self.without_frozen(state or model.state_dict()))
        self._add_untouched(folder)

    def _add_untouched(self, folder: Path) -> None:
        """Write the untouched tensors beside those that a trained model was saved with, and the index of all."""
        if not self.untouched:
            return
        own = StoredTensors(folder)
        saved = {file: [name for name in own if own.path(name).name == file] for file in weight_map(folder)}
        files = [*saved]
        empty = {name: torch.empty_like(self.stored[name], device="meta") for name in self.untouched}
        shards = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_BYTES)
        for number, names in enumerate(shards.filename_to_tensors.values()):
            path = folder / f".base-{number}.safetensors"
            save_tensors({name: self.stored[name] for name in names}, path)
            files.append(path.name)
            saved[path.name] = names
        placed = {}
        for number, name in enumerate(files, start=1):
            final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            (folder / name).rename(folder / f".{final}")
            placed[final] = saved[name]
        for final in placed:
            (folder / f".{final}").rename(folder / final)
        size = sum((folder / name).stat().st_size for name in placed)
        places = {tensor: name for name, tensors in placed.items() for tensor in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def report(self, folder: Path, changed: set[str]) -> dict[str, int]:
        """Compare a saved model, in which these weights changed, with its base; return numbers of tensors."""
        result = set(StoredTensors(folder))
        missing = [
            name
            for name in self.stored
            if name not in result and name not in self.tied and not COMPUTED_BUFFERS.search(name)
        ]
        if missing:
            raise CheckpointError(f"{folder}: tensors of the base are missing: {format_names(missing)}")
        moved = {name for name, weights in self.weights_of.items() if changed & set(weights)} & result
        same = len(result & set(self.stored)) - len(moved)
        added = len(result - set(self.stored))
        return {"changed": len(moved), "identical": same, "missing": 0, "added": added}
