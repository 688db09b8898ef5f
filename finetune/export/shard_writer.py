"""Pieces to safetensors files of a size, and the index that says which is where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.export.merge_plan import OutputTensor
from finetune.utils.errors import StorageError

SINGLE, NUMBERED, INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"


def stored_dtype(piece: OutputTensor, dtype: Any, usual: Any) -> Any:
    """In which type a piece is written: `dtype`, but for what is not a number of that kind, or is kept apart.

    Models store some small tensors (the bias of a router, say) finer than the rest, `usual`: those stay as they are.
    """
    if not piece.dtype.is_floating_point:
        return piece.dtype
    finer = piece.dtype.itemsize > usual.itemsize and not piece.computed
    return piece.dtype if finer else dtype


def in_shards(pieces: Sequence[OutputTensor], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of pieces, file by file; a file is larger than `limit` only where a single piece is.

    >>> in_shards([None] * 4, [3, 3, 9, 1], 6)
    [[0, 1], [2], [3]]
    """
    shards: list[list[int]] = [[]]
    filled = 0
    for number, size in enumerate(sizes):
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(number)
        filled += size
    return shards


def write_shards(folder: Path, pieces: Sequence[OutputTensor], dtypes: Sequence[Any], limit: int) -> int:
    """Write all pieces, one file after the other; the bytes of all tensors. A bar shows how far it is.

    Args:
        dtypes: in which each is written.
        limit: bytes of a file.

    Raises:
        StorageError: the disk refused.
    """
    sizes = [piece.count * dtype.itemsize for piece, dtype in zip(pieces, dtypes, strict=True)]
    shards = in_shards(pieces, sizes, limit)
    where: dict[str, str] = {}
    with tqdm(total=sum(sizes), desc="merging", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else NUMBERED.format(number, len(shards))
            _write(folder / name, ((pieces[one], dtypes[one], sizes[one]) for one in shard), bar)
            where |= {pieces[one].name: name for one in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(sizes)


def _write(path: Path, shard: Iterable[tuple[OutputTensor, Any, int]], bar: Any) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {}
    for piece, dtype, size in shard:
        tensors[piece.name] = piece.get().to(dtype).contiguous()
        bar.update(size)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: cannot be written: {error}") from None
