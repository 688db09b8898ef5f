"""Read the tensors of a model's folder by name, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.models.loader import weight_files
from finetune.utils.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

# As safetensors writes them: https://github.com/huggingface/safetensors#format
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


class StoredTensors:
    """Tensors of `model*.safetensors` or `pytorch_model*.bin` in a folder; each is read when it is needed."""

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
        """Return the shape of a tensor."""
        return list(self._slice(name).get_shape() if self._is_safetensors(name) else self.get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of a tensor."""
        import torch

        if not self._is_safetensors(name):
            return self.get(name).dtype
        stored_dtype = self._slice(name).get_dtype()
        if stored_dtype not in DTYPES:
            raise CheckpointError(
                f"{self._files[name]}: {name} is stored as {stored_dtype}: quantized weights cannot be merged"
            )
        return getattr(torch, DTYPES[stored_dtype])

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored type."""
        if self._is_safetensors(name):
            with self._open(self._files[name]) as file:
                return file.get_tensor(name)
        return self._load_pickle(self._files[name])[name]

    def _slice(self, name: str) -> Any:
        with self._open(self._files[name]) as file:
            return file.get_slice(name)

    def _is_safetensors(self, name: str) -> bool:
        return self._files[name].suffix == ".safetensors"

    def _names_in(self, path: Path) -> list[str]:
        if path.suffix != ".safetensors":
            return list(self._load_pickle(path))
        with self._open(path) as file:
            return list(file.keys())

    @staticmethod
    def _open(path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    @staticmethod
    def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
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
        raise CheckpointError(f"{folder}: {missing[0]} is missing, though the index of the weights names it")
    return files
