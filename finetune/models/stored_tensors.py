"""Read the tensors of a model's folder by name, one at a time, and write files of them."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune.config.saved_adapter import ADAPTER_FILES
from finetune.models.model_folder import is_lfs_pointer, weight_map
from finetune.utils.errors import CheckpointError, FinetuneError, first_line, format_names, os_reason


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write a safetensors file; tensors that share memory, as those of a `.bin` file may, are written each."""
    from safetensors.torch import save_file

    own, memories = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in memories else tensor
        own[name] = own[name].contiguous()
        memories.add(memory)
    save_file(own, path, metadata={"format": "pt"})


class _Place(NamedTuple):
    path: Path
    shape: tuple[int, ...]


class StoredTensors(Mapping[str, Any]):
    """Tensors of `model*.safetensors` or `pytorch_model*.bin` in a folder, in their stored types.

    The files are mapped into memory: only the values that are used are read. Names and shapes in safetensors need no
    torch.

    Raises:
        FinetuneError: Of the class `error`: no weights, truncated files, files of the index that are missing, or
            tensors that are not in the file that the index names.
    """

    def __init__(self, folder: Path, *, error: type[FinetuneError] = CheckpointError) -> None:
        self._error = error
        files = weight_map(folder, error=error)
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise error(
                f"{folder}: the index of the weights names files that are missing: {format_names(missing)}: copy the "
                "whole model"
            )
        self._places: dict[str, _Place] = {}
        misplaced = []
        for name, indexed in files.items():
            places = dict(self._read_headers(folder / name))
            self._places |= places
            misplaced += [f"{tensor} in {name}" for tensor in indexed if tensor not in places]
        if misplaced:
            raise error(
                f"{folder}: the index of the weights names tensors that its files do not hold: "
                f"{format_names(misplaced)}: copy the index and the files again, from the same place"
            )
        if not self._places:
            raise error(f"{folder}: holds no weights")

    def __getitem__(self, name: str) -> Any:
        path = self._places[name].path
        file = open_weights(path, error=self._error)
        tensor = file[name] if isinstance(file, dict) else file.get_tensor(name)
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            raise self._error(f"{path}: {name} is stored as {tensor.dtype}: quantized weights cannot be merged")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def path(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self._places[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; its values are not read."""
        return self._places[name].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by name."""
        return {name: place.shape for name, place in self._places.items()}

    def _read_headers(self, path: Path) -> Iterator[tuple[str, _Place]]:
        file = open_weights(path, "np", error=self._error)
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            shape = file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape()
            yield str(name), _Place(path, tuple(shape))


def open_weights(path: Path, framework: str = "pt", *, error: type[FinetuneError] = CheckpointError) -> Any:
    """Map a file: a dictionary of tensors, or a safetensors file with `keys` and `get_tensor`.

    Args:
        framework: "np" needs no torch to read names and shapes of safetensors.

    Raises:
        FinetuneError: Of the class `error`: the file is not there, truncated or damaged.
    """
    from safetensors import safe_open

    try:
        path.open("rb").close()
    except OSError as problem:  # safetensors says of a file of another user that there is none
        raise error(f"{path}: cannot be read: {os_reason(problem, path)}") from None
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework=framework)
        import torch

        loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}
    except Exception as problem:  # a damaged pickle or zip file fails in any way
        is_pointer = is_lfs_pointer(path)
        remedy = "a pointer of Git LFS: run git lfs pull" if is_pointer else "it may be truncated: copy it again"
        raise error(f"{path}: cannot be read: {first_line(problem)}: {remedy}") from None


def stored_names(folder: Path, *, error: type[FinetuneError] = CheckpointError) -> list[str]:
    """Return the names of the tensors of a model without torch, once the headers of its safetensors are checked.

    Of other files it returns what their index names, and a file of an adapter is checked only.
    """
    for path in (folder / name for name in ADAPTER_FILES):
        if path.suffix == ".safetensors" and path.is_file():
            open_weights(path, "np", error=error)
    files = weight_map(folder, error=error)
    if files and all(name.endswith(".safetensors") for name in files):
        return [*StoredTensors(folder, error=error)]
    return [tensor for names in files.values() for tensor in names]
