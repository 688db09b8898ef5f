"""Read the float32 weights of a ZeRO checkpoint, one parameter at a time.

Each rank keeps its share of every weight in `*_optim_states.pt`; which weights there are, in which order and shape,
stands in the model states beside it (DeepSpeed 0.19, `deepspeed/utils/zero_to_fp32.py` reads the same). Files are
mapped into memory, not read: what a weight needs is fetched when it is asked for.

    stage 1, 2   one long vector per group of parameters, cut into as many parts as ranks
                     weights  a a a a b b | b c c c - -        ranks 0 | 1, - is padding
    stage 3      each weight is cut by itself, and a rank's parts lie behind each other
                     weight a  a a | a -      rank 0 keeps  a a b b c c
                     weight b  b b | b b      rank 1 keeps  a - b b c -
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.checkpoint.integrity import zero_tag
from finetune.checkpoint.manifest import read_manifest
from finetune.checkpoint.torch_files import load_data, pickle_fault, verified_loads
from finetune.utils.errors import CheckpointError

RANK = re.compile(r"zero_pp_rank_(\d+)_")
STAGE, PARTS, SHAPES, BUFFERS = "zero_stage", "partition_count", "param_shapes", "buffer_names"
FLAT = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


class MasterWeights:
    """The trained weights of a ZeRO checkpoint, of any stage and any number of ranks.

    Attributes:
        shapes: whole shapes by name, in the order of the checkpoint.
        buffers: of the model, by name.

    Raises:
        CheckpointError: a rank's file is missing, brings code, or the parts do not add up to the weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, manifest = folder, read_manifest(folder)
        tag = zero_tag(folder, manifest)
        if tag is None:
            raise CheckpointError(f"{folder}: holds no ZeRO checkpoint: there is no file `latest`")
        states, names = folder / tag, [name for name in manifest.files if name.startswith(f"{tag}/")]
        with verified_loads(folder, manifest.files):
            parts = [_load(folder / name)["optimizer_state_dict"] for name in _of_all_ranks(states, names)]
            model = _load(folder / _model_states(states, names))
        self.stage, self.world_size = int(parts[0][STAGE]), len(parts)
        expected = parts[0][PARTS]
        expected = max(expected) if isinstance(expected, list) else expected
        if expected != self.world_size:
            raise CheckpointError(f"{states}: {expected} ranks wrote it, and files of {self.world_size} are there")
        groups = [{name: list(shape) for name, shape in group.items()} for group in model[SHAPES]]
        self.shapes = {name: shape for group in groups for name, shape in group.items()}
        self.buffers = {name: model["module"][name] for name in model[BUFFERS] if name in model["module"]}
        vectors = [part[FLAT[self.stage]] for part in parts]
        paddings = parts[0].get("param_alignment_paddings")
        place = self._place_stage_3 if self.stage == 3 else self._place_stages_1_and_2
        self._parts: dict[str, list[Any]] = dict(place(groups, vectors, paddings))

    def get(self, name: str) -> Any:
        """Return a full weight in float32, concatenated from the parts of the ranks."""
        import torch

        return torch.cat(self._parts[name])[: math.prod(self.shapes[name])].view(self.shapes[name])

    def _place_stages_1_and_2(
        self, groups: Sequence[dict[str, list[int]]], vectors: Sequence[Sequence[Any]], paddings: Any
    ) -> Iterator[tuple[str, list[Any]]]:
        for number, group in enumerate(groups):
            parts = [rank[number] for rank in vectors]
            offset = 0
            for place, (name, shape) in enumerate(group.items()):
                count = math.prod(shape)
                yield name, self._slices(name, parts, offset, count)
                offset += count + (paddings[number][place] if paddings else 0)

    def _place_stage_3(
        self, groups: Sequence[dict[str, list[int]]], vectors: Sequence[Sequence[Any]], paddings: Any
    ) -> Iterator[tuple[str, list[Any]]]:
        offset = 0
        for group in groups:
            for name, shape in group.items():
                share = -(-math.prod(shape) // self.world_size)
                yield name, [part for rank in vectors for part in self._slices(name, rank, offset, share)]
                offset += share

    def _slices(self, name: str, vectors: Sequence[Any], offset: int, count: int) -> list[Any]:
        """Return the numbers `offset` to `offset + count` of vectors laid behind each other, as views into these."""
        slices, ends = [], list(accumulate(vector.numel() for vector in vectors))
        for vector, end in zip(vectors, ends, strict=True):
            begin = end - vector.numel()
            first, last = max(offset, begin), min(offset + count, end)
            if first < last:
                slices.append(vector.narrow(0, first - begin, last - first))
        if sum(part.numel() for part in slices) != count:
            raise CheckpointError(f"{self.folder}: the parts of {name} do not add up: the checkpoint is not whole")
        return slices


def _of_all_ranks(states: Path, names: Sequence[str]) -> list[str]:
    ranks = {
        int(match[1]): name for name in names if name.endswith("_optim_states.pt") and (match := RANK.search(name))
    }
    if not ranks or sorted(ranks) != list(range(len(ranks))):
        raise CheckpointError(f"{states}: the optimizer states of ranks {sorted(ranks)} are there, some are missing")
    return [ranks[rank] for rank in sorted(ranks)]


def _model_states(states: Path, names: Sequence[str]) -> str:
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if f"{states.name}/{name}" in names:
            return f"{states.name}/{name}"
    raise CheckpointError(f"{states}: holds no model states")


def _load(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, mapped into memory, known to hold nothing but numbers."""
    fault = pickle_fault(path)
    if fault:
        raise CheckpointError(fault)
    return load_data(path, mmap=True)
