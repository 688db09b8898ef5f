"""Read the tensors of a model's folder by name, one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetune.models.loader import weight_files
from finetune.utils.errors import CheckpointError, first_line


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of `model*.safetensors` or `pytorch_model*.bin` in a folder, in their stored types.

    The files are mapped into memory: only the values that are used are read.
    """

    def __init__(self, folder: Path) -> None:
        files = weight_files(folder)
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {missing[0]} is missing, though the index of the weights names it")
        self._files = {name: path for path in files for name in _open(path).keys()}
        if not self._files:
            raise CheckpointError(f"{folder}: holds no weights")

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._files[name]
        file = _open(path)
        try:
            tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            raise CheckpointError(f"{path}: {name} is stored as {tensor.dtype}: quantized weights cannot be merged")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open(path: Path) -> Any:
    """Map a file: a dictionary of tensors, or a safetensors file with `keys` and `get_tensor`."""
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from None
