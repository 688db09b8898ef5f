"""What can be wrong with a run before anything is loaded: files, folders, room on the disk, ranks of a CPU host.

Nothing here needs torch: a mistake costs a second, not the start of all ranks.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from finetune import checkpoint
from finetune.chat_templates.format_selection import read_template
from finetune.config import Arguments, DataArguments
from finetune.config.resolve import check_flags
from finetune.dataset.conversation_reader import read_conversations
from finetune.dataset.data_sources import find_sources, is_local
from finetune.models.model_folder import check_folder, check_tokenizer_files, stored_bytes
from finetune.run_dir import output_dir_lock
from finetune.utils.console import log_notes
from finetune.utils.errors import CheckpointError, ConfigError, FinetuneError, StorageError, format_faults, format_names

BYTES_OF_A_RANK = 400 * 2**20  # torch and transformers, before there is a model
MOST_RANKS_PER_CORE = 8
SECONDS_FOR_ROWS = 0.5


def check_start(arguments: Arguments, ranks_here: int | None = None, *, is_launch: bool = False) -> None:
    """Check what needs neither a library nor a rank; all faults in one error, of the class of the first.

    Args:
        ranks_here: that start on the CPU of this host; None: unknown, or they have GPUs.
        is_launch: nothing of this run has started: whoever is in its folder is another. Ranks wait for one that ends,
            and look for the data when they read it.

    Raises:
        FinetuneError: a file that is not there, a folder that cannot be used, too little room, too many ranks.
    """
    errors: list[FinetuneError] = []
    for check in _checks(arguments, ranks_here, is_launch):
        try:
            check()
        except FinetuneError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])(format_faults(list(dict.fromkeys(map(str, errors))), "fault"))


def _checks(arguments: Arguments, ranks_here: int | None, is_launch: bool) -> Iterator[Callable[[], object]]:
    name = arguments.model.model_name_or_path
    yield lambda: check_folder(name)
    yield lambda: check_tokenizer_files(arguments.model.tokenizer_source()[0])
    if is_launch:
        yield lambda: _check_data(arguments.data)
    yield lambda: _check_skip_rows(arguments.run.skip_rows)
    template, resumed = arguments.data.chat_template, arguments.resumes_from()
    if template is not None:
        yield lambda: read_template(template)
    yield lambda: check_flags(arguments)
    if resumed not in (None, "auto"):
        yield lambda: _check_resume(str(resumed))
    yield lambda: _check_output_dir(arguments, is_launch)
    yield lambda: _check_room(arguments)
    if ranks_here is not None:
        yield lambda: log_notes(check_ranks(ranks_here))


def _check_data(data: DataArguments) -> None:
    """Check that files of data are there, and the rows that can be read in a moment."""
    training, held_out = (list(filter(is_local, paths)) for paths in (data.data_path, data.eval_data_path))
    find_sources([*training, *held_out])
    for paths in (training, held_out) if data.bad_rows == "error" else ():
        read_conversations(paths, repairs=data.repairs, columns=data.columns, seconds=SECONDS_FOR_ROWS)


def _check_skip_rows(files: Sequence[str]) -> None:
    missing = [f"--skip_rows {file}: there is no such file" for file in files if not Path(file).expanduser().is_file()]
    if missing:
        raise ConfigError(format_faults(missing, "fault"))


def _check_resume(resumed: str) -> None:
    folder = Path(resumed).expanduser()
    if not folder.is_dir():
        reason = "is a file: name the folder of a checkpoint" if folder.is_file() else "there is no such folder"
        raise ConfigError(f"--resume_from_checkpoint {folder}: {reason}")
    if not checkpoint.is_complete(folder):
        inside = [checkpoint.checkpoint_folder(folder, step).name for step in checkpoint.steps_in(folder)]
        hint = f"; it holds {format_names(inside)}" if inside else ""
        raise CheckpointError(f"--resume_from_checkpoint {folder}: holds no {checkpoint.MANIFEST_FILE}{hint}")


def _check_output_dir(arguments: Arguments, is_launch: bool) -> None:
    folder = arguments.output_dir
    output_dir_lock.check_output_dir(
        folder, overwrite=arguments.run.overwrite_output_dir, resume=arguments.resumes_from() is not None
    )
    if is_launch and output_dir_lock.is_locked(folder):
        raise ConfigError(output_dir_lock.in_use(folder))


def _check_room(arguments: Arguments) -> None:
    """Check that the first checkpoint of a full run has room: its weights, and two moments of each for AdamW."""
    folder = Path(arguments.model.model_name_or_path).expanduser()
    size = stored_bytes(folder) if folder.is_dir() and arguments.adapter.kind() is None else None
    if size is None:
        return
    saves = arguments.given("save_strategy") != "no" and not arguments.given("save_only_model")
    needed = size * 3 if saves and str(arguments.given("optim") or "adamw_torch").startswith("adamw_torch") else size
    free = shutil.disk_usage(output_dir_lock.existing_parent(arguments.output_dir)).free
    if free < needed:
        raise StorageError(
            f"--output_dir {arguments.output_dir}: {free / 1e9:.1f} GB are free, "
            f"{'a checkpoint' if saves else 'the result'} takes at least {needed / 1e9:.1f} GB: free some space, "
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
