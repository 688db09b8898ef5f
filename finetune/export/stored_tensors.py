"""The tensors of a model's folder, by name, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.models.loader import weight_files
from finetune.utils.errors import CheckpointError, first_line

# As safetensors writes them: https://github.com/huggingface/safetensors#format
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


class StoredTensors:
    """What `model*.safetensors`, or `pytorch_model*.bin`, of a folder hold; nothing is read before it is asked for.

    Raises:
        CheckpointError: no weights, a file that ends too soon, or one that the index names and that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: path for path in _files_of(folder) for name in self._names_in(path)}
        if not self._files:
            raise CheckpointError(f"{folder}: holds no weights")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> list[int]:
        """Of a tensor."""
        return list(self._slice(name).get_shape() if self._is_safe(name) else self.get(name).shape)

    def dtype(self, name: str) -> Any:
        """Of a tensor, as it is stored."""
        import torch

        if not self._is_safe(name):
            return self.get(name).dtype
        kind = self._slice(name).get_dtype()
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self._files[name]}: {name} is stored as {kind}: quantized weights cannot be merged"
            )
        return getattr(torch, DTYPES[kind])

    def get(self, name: str) -> Any:
        """A tensor, as it is stored."""
        if self._is_safe(name):
            with self._opened(self._files[name]) as file:
                return file.get_tensor(name)
        return self._unpickled(self._files[name])[name]

    def _slice(self, name: str) -> Any:
        with self._opened(self._files[name]) as file:
            return file.get_slice(name)

    def _is_safe(self, name: str) -> bool:
        return self._files[name].suffix == ".safetensors"

    def _names_in(self, path: Path) -> list[str]:
        if path.suffix != ".safetensors":
            return list(self._unpickled(path))
        with self._opened(path) as file:
            return list(file.keys())

    @staticmethod
    def _opened(path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    @staticmethod
    def _unpickled(path: Path) -> dict[str, Any]:
        import pickle

        import torch

        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from None


def _files_of(folder: Path) -> list[Path]:
    files = weight_files(folder)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]} is not there, and the index of its weights names it")
    return files
