"""Merge: where the weights are, what of them is needed, written aside, proven, and only then given its name."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.checkpoint import MasterWeights, step_of
from finetune.export import merge_check
from finetune.export import model_files as beside
from finetune.export.merge_plan import MergedTensors, OutputTensor, check_mergeable, master_tensors, plain_tensors
from finetune.export.shard_writer import stored_dtype, write_shards
from finetune.export.stored_tensors import StoredTensors
from finetune.export.weight_names import WeightNames
from finetune.inference.load_result import (
    base_folder,
    chat_format_of,
    load_for_inference,
    load_saved_adapter,
    load_strict,
    load_tokenizer,
)
from finetune.inference.run_result import RunResult
from finetune.models.adapters import check_saved_adapter
from finetune.models.loader import stored_bytes, torch_dtype
from finetune.run_dir.run_json import update_run_json
from finetune.utils.errors import CheckpointError, ConfigError, StorageError, format_faults

ROOM_TO_SPARE = 64 << 20


@dataclass(frozen=True)
class MergePlan:
    """What will be merged.

    Attributes:
        target: the folder that will hold it.
        source: whose config and code apply: the base of an adapter, else the result itself.
        tokenizer: the result's.
        pieces: every tensor of the merged model.
        dtypes: in which each is written, and `usual` for most.
        unties: embeddings and head were one tensor, and are two.
        origin: where the weights come from, in words.
    """

    result: RunResult
    target: Path
    source: Path
    tokenizer: Any
    pieces: list[OutputTensor]
    dtypes: list[Any]
    usual: Any
    unties: bool
    origin: str

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.count * dtype.itemsize for piece, dtype in zip(self.pieces, self.dtypes, strict=True))


@dataclass(frozen=True)
class MergeResult:
    """What came of it: the folder, its tensors' bytes, and lines that say what was seen."""

    folder: Path
    size: int
    checked: str
    notes: tuple[str, ...]


def plan_merge(result: RunResult, target: Path, *, base_name: str | None, dtype: str | None) -> MergePlan:
    """Find out what to merge into the folder `target`, and everything that hinders it, without reading a weight.

    Args:
        base_name: where the base lies now, unless where it was.
        dtype: bf16, fp16 or float32; None: the precision of the training.

    Raises:
        ConfigError: a target that holds something; an adapter that is no weights; a base that is not there; a model
            stored quantized.
        CheckpointError: the checkpoint is not whole, the base another model, the adapter of another size.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not replaced: name another folder, or remove it")
    check_mergeable(result.adapter)
    if step_of(result.folder.absolute()) is not None:
        faults = checkpoint.verify_checkpoint(result.folder)
        if faults:
            raise CheckpointError(format_faults(faults, "fault"))
    source = result.folder if result.adapter is None else base_folder(result, base_name)
    tokenizer = load_tokenizer(result)
    model = _empty_model(source, beside.rows_of(source, tokenizer), trusts_code=result.trusts_code)
    unties = False
    if result.adapter is not None:
        check_saved_adapter(result.folder)
        found = MergedTensors(StoredTensors(source), model, result.folder, load_saved_adapter)
        pieces, unties, origin = found.pieces(), found.unties, f"{result.folder} and its base {source}"
    elif (result.folder / "latest").is_file() and (dtype == "float32" or not stored_bytes(result.folder)):
        masters = MasterWeights(result.folder)
        pieces = master_tensors(masters, WeightNames(model))
        origin = f"the float32 weights of {masters.world_size} ranks in {result.folder} (ZeRO stage {masters.stage})"
    else:
        pieces, origin = plain_tensors(StoredTensors(result.folder), model), str(result.folder)
    wanted = torch_dtype(dtype or result.precision)
    usual = _usual_dtype(pieces)
    dtypes = [stored_dtype(one, wanted, usual) for one in pieces]
    return MergePlan(result, target, source, tokenizer, pieces, dtypes, wanted, unties, origin)


def merge_weights(plan: MergePlan, *, shard_bytes: int, proves: bool = True) -> MergeResult:
    """Write the merged model, whole or not at all.

    Args:
        shard_bytes: of a file; about what is held in memory.
        proves: open it and compare its logits with those of what was trained, where memory allows.

    Raises:
        CheckpointError: what was written is not what was trained.
        StorageError: the disk is too small, or refused.
    """
    result, target, tokenizer = plan.result, plan.target, plan.tokenizer
    _check_room(target, plan.size)
    chat_format = chat_format_of(result, tokenizer)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        size = write_shards(part, plan.pieces, plan.dtypes, shard_bytes)
        rows = beside.rows_of(plan.source, tokenizer)
        dtype = str(plan.usual).removeprefix("torch.")
        beside.write_config(part, plan.source, dtype=dtype, rows=rows, unties=plan.unties)
        beside.write_generation_config(part, plan.source, result.chat["stop_token_id"])
        note = beside.write_tokenizer(part, tokenizer, chat_format)
        beside.pass_on(part, plan.source)
        beside.write_card(part, result, beside.card_facts(result))
        update_run_json(part, {**result.run, "merged": {"from": str(result.folder.absolute()), "origin": plan.origin}})
        checked = _proven(plan, part, chat_format) if proves else "not opened: --no_check"
        part.rename(target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return MergeResult(target, size, checked, tuple(filter(None, [note])))


def _proven(plan: MergePlan, part: Path, chat_format: Any) -> str:
    """Open what was written, compare it with what was trained; a line that says what was seen."""
    import torch

    hindered = merge_check.missing_memory(plan.size)
    if hindered:
        return f"not opened: {hindered}"
    trusts = plan.result.trusts_code
    if plan.result.adapter is None and not stored_bytes(plan.result.folder):
        load_strict(part, torch.float32, trusts_code=trusts)
        return "it opens with plain transformers, each weight in its place"
    opened = load_for_inference(plan.result, base_name=str(plan.source) if plan.result.adapter else None)
    longest = getattr(opened.tuned.config.get_text_config(), "max_position_embeddings", None)
    rows = merge_check.rows_for(chat_format, longest)
    expected = merge_check.logits_of(opened.tuned, rows)
    del opened
    return merge_check.compare_logits(
        part, expected, rows, {_name_of(plan.usual), plan.result.precision}, trusts_code=trusts
    )


def _empty_model(source: Path, rows: int, *, trusts_code: bool) -> Any:
    """The model with so many rows of embeddings; each weight is one zero, seen as often as it has numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=trusts_code)
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"{source}: is stored quantized: merge into the model that it was made from")
    config.get_text_config().vocab_size = rows
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusts_code)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=torch.float32).expand(weight.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return model


def _check_room(target: Path, size: int) -> None:
    above = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(above).free
    if free < size + ROOM_TO_SPARE:
        raise StorageError(f"{target}: the merged model takes {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")


def _usual_dtype(pieces: list[OutputTensor]) -> Any:
    """The type of most stored numbers."""
    import torch

    counts: dict[Any, int] = {}
    for piece in pieces:
        if piece.dtype.is_floating_point and not piece.computed:
            counts[piece.dtype] = counts.get(piece.dtype, 0) + piece.count
    return max(counts, key=counts.__getitem__, default=torch.float32)


def _name_of(dtype: Any) -> str:
    """Of ours: bf16, fp16, float32."""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(dtype), "float32")
