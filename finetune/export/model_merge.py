"""Merge a result into a plain model: plan the tensors, write them beside the target, verify, rename."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from finetune.chat_templates import ChatFormat
from finetune.checkpoint import MasterWeights
from finetune.config.hardware import Precision
from finetune.export import model_files, verify_saved
from finetune.export.merge_plan import MergedTensors, OutputTensor, check_mergeable, master_tensors, plain_tensors
from finetune.export.model_card import write_model_card
from finetune.export.weight_names import WeightNames
from finetune.inference import load_result
from finetune.inference.run_result import RunResult
from finetune.models.adapters import check_saved_adapter
from finetune.models.auto_class import empty_model
from finetune.models.loader import damage_named, precision_of, torch_dtype
from finetune.models.model_config import set_vocab_size
from finetune.models.model_folder import stored_bytes
from finetune.models.stored_tensors import StoredTensors
from finetune.run_dir.output_dir_lock import existing_parent
from finetune.run_dir.run_json import update_run_json
from finetune.utils.errors import CheckpointError, ConfigError, StorageError, as_os_error, os_reason

SPARE_DISK_BYTES = 64 << 20
VERIFY_MEMORY_FACTOR = 2.4  # float32 copy of 16-bit weights, and some more


@dataclass(frozen=True)
class MergePlan:
    """What will be merged."""

    result: RunResult
    target: Path  # folder of the merged model
    source: Path  # folder whose config and code are used: the base of an adapter, else the result itself
    tokenizer: PreTrainedTokenizerBase
    tensors: list[OutputTensor]
    dtypes: list[torch.dtype]  # type in which each tensor is written; `dtype` for most
    dtype: torch.dtype
    unties: bool  # embeddings and head were one tensor and become two
    origin: str  # where the weights come from, for the user
    trusts_code: bool  # Python files in `source` may run

    @property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.count * dtype.itemsize for tensor, dtype in zip(self.tensors, self.dtypes, strict=True))


@dataclass(frozen=True)
class MergeResult:
    """The folder of the merged model, the size of its tensors in bytes, and lines for the user."""

    folder: Path
    size: int
    checked: str
    notes: tuple[str, ...]


def plan_merge(result: RunResult, target: Path, *, base_name: str | None, dtype: Precision | None) -> MergePlan:
    """Plan a merge into the folder `target` and check that it is possible, without reading weights.

    Args:
        base_name: Path of the base model if it was moved.
        dtype: Type of the merged weights; None: the precision of the training.
    """
    check_mergeable(result.adapter)
    source = result.folder if result.adapter is None else load_result.base_folder(result, base_name)
    tokenizer = load_result.load_tokenizer(result)
    trusts_code = load_result.trusts_code_in(source, result)
    model = _model_without_memory(source, model_files.vocab_size_of(source, tokenizer), trusts_code=trusts_code)
    unties = False
    if result.adapter is not None:
        check_saved_adapter(result.folder)
        merged = MergedTensors(StoredTensors(source), model, result.folder, load_result.load_saved_adapter)
        tensors, unties, origin = merged.outputs(), merged.unties, f"{result.folder} and its base {source}"
    elif (result.folder / "latest").is_file() and (dtype == "float32" or not stored_bytes(result.folder)):
        masters, names = MasterWeights(result.folder), WeightNames(model)
        untrained = names.state.keys() - {*masters.shapes, *masters.buffers, *model.all_tied_weights_keys}
        has_weights = stored_bytes(result.folder) is not None
        stored = None
        if has_weights or untrained:
            stored = StoredTensors(result.folder if has_weights else load_result.base_folder(result, base_name))
            names.group_files(stored.shapes())
        tensors = master_tensors(masters, names, stored)
        origin = f"the float32 weights of {masters.world_size} ranks in {result.folder} (ZeRO stage {masters.stage})"
    else:
        tensors, origin = plain_tensors(StoredTensors(result.folder), model), str(result.folder)
    target_dtype = torch_dtype(dtype or result.precision)
    usual_dtype = _usual_dtype(tensors)
    dtypes = [_output_dtype(tensor, target_dtype, usual_dtype) for tensor in tensors]
    return MergePlan(result, target, source, tokenizer, tensors, dtypes, target_dtype, unties, origin, trusts_code)


def merge_weights(plan: MergePlan, *, shard_bytes: int, verify: bool = True) -> MergeResult:
    """Write the merged model; after an error nothing is left behind.

    Args:
        shard_bytes: Maximum size of a file, and about the memory that is needed.
        verify: Load the merged model and compare its logits with those of what was trained, if memory allows.
    """
    result, target, tokenizer = plan.result, plan.target, plan.tokenizer
    free = shutil.disk_usage(existing_parent(target)).free
    if free < plan.size + SPARE_DISK_BYTES:
        raise StorageError(f"{target}: the merged model takes {plan.size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")
    chat_format = load_result.chat_format_of(result, tokenizer)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        model_files.write_weights(part, plan.tensors, plan.dtypes, shard_bytes)
        model_files.write_config(
            part,
            plan.source,
            dtype=str(plan.dtype).removeprefix("torch."),
            vocab_size=model_files.vocab_size_of(plan.source, tokenizer),
            unties=plan.unties,
        )
        model_files.write_generation_config(part, plan.source, result.chat["stop_token_id"])
        note = model_files.write_tokenizer(part, tokenizer, chat_format)
        model_files.copy_other_files(part, plan.source)
        update_run_json(part, {**result.run, "merged": {"from": str(result.folder.absolute()), "origin": plan.origin}})
        write_model_card(replace(result, folder=part), merges=result.adapter is not None)
        checked = _verify(plan, part, chat_format) if verify else "not verified: --no_check"
        part.rename(target)
    except Exception as error:
        if (of_system := as_os_error(error)) is None:
            raise
        raise StorageError(f"{target}: cannot be written: {os_reason(of_system, target)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return MergeResult(target, plan.size, checked, () if note is None else (note,))


def _verify(plan: MergePlan, part: Path, chat_format: ChatFormat) -> str:
    """Load what was written and compare it with what was trained; return a line for the user."""
    shortage = load_result.memory_shortage(plan.size * VERIFY_MEMORY_FACTOR)
    if shortage:
        return f"not verified: {shortage}"
    result = plan.result
    if result.adapter is None and not stored_bytes(result.folder):
        load_result.load_strict(part, torch.float32, trusts_code=plan.trusts_code)
        return "it loads with plain transformers, and no weight is missing"
    precisions = {precision_of(plan.dtype), result.precision}
    options: Any = {"base_name": str(plan.source) if result.adapter else None, "unquantized": True}
    loaded = load_result.load_for_inference(result, **options)
    max_length = getattr(loaded.tuned.config.get_text_config(), "max_position_embeddings", None)
    rows = verify_saved.verification_rows(chat_format, max_length)
    expected = verify_saved.logits_of(loaded.tuned, rows)
    del loaded
    try:
        return verify_saved.compare_logits(part, expected, rows, precisions, trusts_code=plan.trusts_code)
    except CheckpointError:
        if result.adapter is None:
            raise
    # A router, or an indexer of tokens, may decide a tie the other way: weights that peft merged round alike.
    merged = load_result.load_for_inference(result, **options).tuned
    merged.merge_adapter()
    expected = verify_saved.logits_of(merged, rows)
    del merged
    checked = verify_saved.compare_logits(part, expected, rows, precisions, trusts_code=plan.trusts_code)
    return f"{checked}, once peft has merged them"


def _model_without_memory(source: Path, vocab_size: int, *, trusts_code: bool) -> Any:
    """Build the model; each weight is one zero, expanded to its shape."""
    with damage_named(str(source)):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trusts_code)
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{source}: is stored quantized, and cannot hold a merged adapter: serve both, as finetune chat does, or "
            "train on the model that it was made from"
        )
    set_vocab_size(config, vocab_size)
    model = empty_model(config, trust_remote_code=trusts_code)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=torch.float32).expand(weight.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    return model


def _output_dtype(tensor: OutputTensor, dtype: torch.dtype, usual: torch.dtype) -> torch.dtype:
    """Return `dtype`, unless the tensor is not floating point or stored in a wider type than most (`usual`).

    Models store some small tensors in a wider type (the bias of a router), which they keep.
    """
    is_wider = tensor.dtype.itemsize > usual.itemsize and not tensor.computed
    return tensor.dtype if is_wider or not tensor.dtype.is_floating_point else dtype


def _usual_dtype(tensors: list[OutputTensor]) -> torch.dtype:
    """Return the type of most stored elements."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point and not tensor.computed:
            counts[tensor.dtype] += tensor.count
    return max(counts, key=counts.__getitem__, default=torch.float32)
