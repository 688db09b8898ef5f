"""Write tensors to safetensors files of limited size, with an index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from finetune.export.merge_plan import OutputTensor
from finetune.utils.errors import StorageError

if TYPE_CHECKING:
    import torch

SINGLE, NUMBERED, INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"


def output_dtype(tensor: OutputTensor, dtype: torch.dtype, usual: torch.dtype) -> torch.dtype:
    """Return the type in which a tensor is written: `dtype`, unless it is not floating point or is kept more precise.

    Args:
        usual: Stored type of most tensors. Models store some small ones in a wider type (the bias of a router), which
            they keep.
    """
    is_wider = tensor.dtype.itemsize > usual.itemsize and not tensor.computed
    return tensor.dtype if is_wider or not tensor.dtype.is_floating_point else dtype


def assign_shards(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Assign tensors of these sizes to files, in order; a file exceeds `limit` only if one tensor does.

    >>> assign_shards([3, 3, 9, 1], 6)
    [[0, 1], [2], [3]]
    """
    shards: list[list[int]] = [[]]
    shard_size = 0
    for index, size in enumerate(sizes):
        if shards[-1] and shard_size + size > limit:
            shards.append([])
            shard_size = 0
        shards[-1].append(index)
        shard_size += size
    return shards


def write_shards(folder: Path, tensors: Sequence[OutputTensor], dtypes: Sequence[torch.dtype], limit: int) -> int:
    """Write all tensors, file by file, with a progress bar; return their size in bytes.

    Args:
        dtypes: Type in which each is written.
        limit: Size of a file in bytes.
    """
    sizes = [tensor.count * dtype.itemsize for tensor, dtype in zip(tensors, dtypes, strict=True)]
    shards = assign_shards(sizes, limit)
    file_of: dict[str, str] = {}
    with tqdm(total=sum(sizes), desc="merging", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else NUMBERED.format(number, len(shards))
            _write(folder / name, [(tensors[index], dtypes[index]) for index in shard], bar)
            file_of |= {tensors[index].name: name for index in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(sizes)


def _write(path: Path, shard: Sequence[tuple[OutputTensor, torch.dtype]], bar: tqdm[NoReturn]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {}
    for tensor, dtype in shard:
        tensors[tensor.name] = tensor.get().to(dtype).contiguous()
        bar.update(tensor.count * dtype.itemsize)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: cannot be written: {error}") from None
