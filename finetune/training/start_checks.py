"""What can be wrong with a run before anything is loaded: files, folders, room on the disk, ranks of a CPU host.

Nothing here needs torch: a mistake costs a second, not the start of all ranks.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from finetune import checkpoint
from finetune.chat_templates.format_selection import read_template
from finetune.checkpoint import resume
from finetune.config import Arguments, DataArguments
from finetune.config.hardware import DetectedHardware, hardware_of
from finetune.config.optional_packages import check_quantization
from finetune.config.resolve import check_flags, check_output_dir, resolve_config
from finetune.config.run_config import RankCounts, SavedStep
from finetune.dataset.conversation_reader import read_conversations
from finetune.dataset.data_sources import find_local_sources, find_sources, fingerprint_sources, is_local
from finetune.distributed import host_probe
from finetune.launcher import LauncherArgs, Resources, local_slots
from finetune.models.lora_targets import check_target_names
from finetune.models.model_config import StoredConfig, check_attention_heads
from finetune.models.model_folder import check_folder, check_revision, check_tokenizer_files, stored_bytes
from finetune.models.quantization import base_bits
from finetune.models.stored_tensors import stored_names
from finetune.run_dir import output_dir_lock
from finetune.training.resume_check import check_before_ranks
from finetune.utils.console import log_notes, size
from finetune.utils.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FinetuneError,
    StorageError,
    format_names,
    missing_reason,
    near_paths,
    raise_faults,
)
from finetune.utils.hub import hub_file
from finetune.utils.user_files import read_json_object

BYTES_OF_A_RANK = 400 * 2**20  # torch and transformers, before there is a model
MOST_RANKS_PER_CORE = 8
SECONDS_FOR_ROWS, BYTES_READ_IN_A_MOMENT = 0.5, 2**28


@dataclass(frozen=True)
class PlannedRanks:
    """The ranks of a run that has not started: how many, those on this host, and the hardware they get."""

    counts: RankCounts
    here: int
    hardware: DetectedHardware

    @classmethod
    def of_launch(cls, flags: LauncherArgs, resources: Resources | None, *, use_cpu: bool) -> "PlannedRanks | None":
        """Plan from the flags of the launcher; None where only torch can tell what GPUs the ranks get."""
        gpus, hides_all = host_probe.count_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if host_probe.has_unlisted_gpus():
            return None
        facts = {"gpus": gpus, "gpu_facts": host_probe.gpu_facts(), "versions": host_probe.versions()}
        hardware = hardware_of([facts], use_cpu=use_cpu or hides_all)
        slots = resources.slots.values() if resources else [local_slots(flags, 0 if hides_all else gpus)]
        counts = [len(ids) for ids in slots]
        if counts[0] != gpus and len({*hardware.gpus}) > 1:  # which of unlike GPUs have these numbers, CUDA decides
            return None
        return cls(RankCounts(sum(counts), max(counts)), counts[0], hardware)


def check_start(arguments: Arguments, planned: PlannedRanks | None = None, *, is_launch: bool = False) -> None:
    """Check what needs neither torch nor a rank; all faults in one error, of the class of the first.

    Args:
        planned: None where the ranks have started, and look at their hardware themselves.
        is_launch: nothing of this run has started: whoever is in its folder is another. Ranks wait for one that ends,
            and look for the data when they read it.

    Raises:
        FinetuneError: a missing file, a folder that cannot be used, too little disk space, too many ranks, flags
            that contradict each other or the DeepSpeed JSON.
    """
    errors: list[FinetuneError] = []
    for check in _checks(arguments, planned, is_launch):
        try:
            check()
        except FinetuneError as error:
            errors.append(error)
    if errors:
        raise_faults((fault for error in errors for fault in error.faults or (str(error),)), type(errors[0]))


def _checks(arguments: Arguments, planned: PlannedRanks | None, is_launch: bool) -> Iterator[Callable[[], object]]:
    yield lambda: _check_model(arguments)
    yield lambda: check_tokenizer_files(arguments.model.tokenizer_source()[0])
    if is_launch:
        yield lambda: _check_data(arguments.data)
    for file in map(Path, arguments.run.skip_rows):
        if not file.expanduser().is_file():
            yield partial(raise_faults, [f"--skip_rows {file}: {missing_reason(file.expanduser())}"])
    yield lambda: checkpoint.key_of(arguments.run.verify_key)
    if cache := arguments.data.data_cache_dir:
        yield lambda: output_dir_lock.check_writable(Path(cache).expanduser(), f"--data_cache_dir {cache}")
    template, resumed = arguments.data.chat_template, arguments.resumes_from()
    if template is not None:
        yield lambda: read_template(template)
    yield lambda: _check_flags(arguments, planned)
    if resumed not in (None, "auto"):
        yield lambda: _check_resume(str(resumed))
    yield lambda: _check_output_dir(arguments, is_launch)
    yield lambda: _check_room(arguments)
    if planned is not None and not planned.hardware.gpus:
        yield lambda: log_notes(check_ranks(planned.here))


def _check_model(arguments: Arguments) -> None:
    """Check the folder of the model, or the config on the hub, and the flags that its config contradicts."""
    name, revision = arguments.model.model_name_or_path, arguments.model.model_revision
    folder, wanted = Path(name).expanduser(), arguments.adapter.lora_target_modules
    check_folder(name)
    check_revision(name, revision)
    values = read_json_object(folder / "config.json" if folder.is_dir() else hub_file(name, "config.json", revision))
    config = StoredConfig(**values)
    check_attention_heads(arguments.batch.sequence_parallel_size, config)
    wanted_bits = arguments.model.quantized_bits()
    bits = base_bits(name, config, wanted_bits)
    if wanted_bits is None:
        check_quantization(bits, f"--model_name_or_path {name} (stored in {bits} bits)", arguments.adapter, None)
    tensors = stored_names(folder, error=ConfigError)
    if arguments.model.adapter_name_or_path:
        stored_names(Path(arguments.model.adapter_name_or_path), error=ConfigError)
    if arguments.adapter.kind() == "lora" and wanted:
        check_target_names(wanted, values, tensors)


def _check_flags(arguments: Arguments, planned: PlannedRanks | None) -> None:
    if planned is None:
        check_flags(arguments)
    else:
        saved = saved_step(arguments, planned.counts.size)
        config = resolve_config(arguments, planned.hardware, planned.counts, saved, imports_deepspeed=False)
        if arguments.resumes_from() is not None:
            check_before_ranks(config, _small_fingerprint(arguments.data))


def saved_step(arguments: Arguments, world_size: int) -> SavedStep | None:
    """Return the step of the checkpoint to resume from, where `--resume_world_size any` may divide it anew."""
    if arguments.run.resume_world_size != "any":
        return None
    key = checkpoint.key_of(arguments.run.verify_key)
    return resume.saved_step(arguments.output_dir, arguments.resumes_from(), world_size, key)


def _check_data(data: DataArguments) -> None:
    """Check that files of data are there, and the rows that can be read in a moment."""
    local = find_local_sources(data.data_path, data.eval_data_path)
    for paths in local if data.bad_rows == "error" else ():
        read_conversations(paths, repairs=data.repairs, columns=data.columns, seconds=SECONDS_FOR_ROWS)


def _small_fingerprint(data: DataArguments) -> str | None:
    """Return the fingerprint of the data, as ranks compute it; None where that takes long, or a file is missing."""
    with suppress(DataError):  # `_check_data` reports it
        sources = find_sources(data.data_path) if all(map(is_local, data.data_path)) else []
        if sources and sum(source.num_bytes for source in sources) < BYTES_READ_IN_A_MOMENT:
            return fingerprint_sources(sources)
    return None


def _check_resume(resumed: str) -> None:
    folder = Path(resumed).expanduser()
    if not folder.is_dir():
        missing = f"there is no such folder{near_paths(folder)}; auto finds the newest checkpoint"
        reason = "is a file: name the folder of a checkpoint" if folder.is_file() else missing
        raise ConfigError(f"--resume_from_checkpoint {folder}: {reason}")
    if not checkpoint.is_complete(folder):
        inside = [checkpoint.checkpoint_folder(folder, step).name for step in checkpoint.steps_in(folder)]
        hint = f"; it holds {format_names(inside)}" if inside else "; auto finds the newest one"
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: holds no {checkpoint.MANIFEST_FILE}: name a complete checkpoint{hint}"
        )


def _check_output_dir(arguments: Arguments, is_launch: bool) -> None:
    folder = arguments.output_dir
    check_output_dir(arguments)
    if is_launch and output_dir_lock.is_locked(folder):
        raise ConfigError(output_dir_lock.in_use(folder))


def _check_room(arguments: Arguments) -> None:
    """Check that the first checkpoint of a full run has room: its weights, and two moments of each for AdamW."""
    folder = Path(arguments.model.model_name_or_path).expanduser()
    stored = stored_bytes(folder) if folder.is_dir() and arguments.adapter.kind() is None else None
    if stored is None:
        return
    saves = arguments.given("save_strategy") != "no" and not arguments.given("save_only_model")
    has_moments = str(arguments.given("optim") or "adamw_torch").startswith("adamw_torch")
    needed = stored * 3 if saves and has_moments else stored
    free = shutil.disk_usage(output_dir_lock.existing_parent(arguments.output_dir)).free
    if free < needed:
        raise StorageError(
            f"--output_dir {arguments.output_dir}: {size(free)} are free, "
            f"{'a checkpoint' if saves else 'the result'} takes at least {size(needed)}: free some space, "
            "choose another disk, or train an adapter (--use_lora)"
        )


def check_ranks(ranks: int) -> list[str]:
    """Check that this host can carry so many ranks on its CPU; return notes for the user."""
    cores, available = len(os.sched_getaffinity(0)), psutil.virtual_memory().available
    shown = f"{ranks} ranks on the {cores} cores of this host, which has no GPU"
    remedy = f"give --num_gpus {max(1, min(cores, available // BYTES_OF_A_RANK))}, or fewer slots in the hostfile"
    if ranks > cores * MOST_RANKS_PER_CORE:
        raise ConfigError(f"{shown}: {remedy}")
    if ranks * BYTES_OF_A_RANK > available:
        raise ConfigError(f"{shown}: they need {ranks * BYTES_OF_A_RANK / 1e9:.0f} GB before there is a model, "
                          f"{available / 1e9:.1f} GB are free: {remedy}")  # fmt: skip
    return [f"{shown}, share them: {remedy}"] if ranks > cores else []
