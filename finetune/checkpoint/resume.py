"""Select the checkpoint to resume from: all ranks settle on the newest complete one before any weights are loaded."""

import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from finetune import checkpoint
from finetune.checkpoint.manifest import STAGE, Manifest
from finetune.config.run_config import CheckpointConfig, SavedStep
from finetune.distributed.collectives import StorageGroup, all_gather_object, get_rank, host_names, run_on_rank_0
from finetune.run_dir import run_json
from finetune.utils.errors import CheckpointError, ConfigError, format_faults, storage_errors
from finetune.utils.user_files import MALFORMED, has_type

logger = logging.getLogger(__name__)
TRAINER_STATE = "trainer_state.json"
STATE_TYPES: dict[str, Any] = {
    "global_step": int, "epoch": float | None, "total_flos": float, "num_input_tokens_seen": int,
    "best_model_checkpoint": str | None, "best_metric": float | None, "log_history": list[dict[str, Any]],
    "stateful_callbacks": dict[str, Any],
}  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that all ranks have verified, and what has changed since it was written."""

    folder: Path
    manifest: Manifest
    changes: tuple[str, ...]
    is_reshaped: bool

    def to_load(self, output_dir: Path) -> tuple[Path, Manifest]:
        """Return the folder to load: the checkpoint's, or its universal form for another world size. All ranks.

        Its files are those of the manifest.

        Raises:
            CheckpointError: it cannot be converted.
            StorageError: there is too little space for it.
        """
        if not self.is_reshaped or self.manifest.facts[STAGE] == "none":
            return self.folder, self.manifest
        target = checkpoint.universal_folder(output_dir, self.manifest.step)
        files = run_on_rank_0(lambda: checkpoint.convert_to_universal(self.folder, self.manifest, target))
        return target, replace(self.manifest, files=files)

    def facts(self) -> dict[str, Any]:
        """Return what run.json records of it."""
        return {
            "step": self.manifest.step,
            "from": str(self.folder),
            "at": run_json.now(),
            "changes": list(self.changes),
        }


def saved_step(output_dir: Path, resume_from: str | None, world_size: int, key: bytes | None) -> SavedStep | None:
    """Return the step of the checkpoint to resume from, where it is from another number of ranks.

    It is read before ranks can ask each other, because DeepSpeed's config holds the size of a batch.
    """
    _, manifest = saved_manifest(output_dir, resume_from, key)
    if manifest is None or manifest.world_size == world_size:
        return None
    return SavedStep(manifest.world_size, manifest.step_rows)


def saved_manifest(output_dir: Path, resume_from: str | None, key: bytes | None) -> tuple[Path, Manifest | None]:
    """Return the checkpoint to resume from, before it is verified, and its manifest; None if there is none to read."""
    folders = [Path(resume_from).expanduser()] if resume_from is not None else []
    if resume_from == "auto":
        folders = [checkpoint.checkpoint_folder(output_dir, step) for step in checkpoint.steps_in(output_dir)]
    for folder in filter(checkpoint.is_complete, folders):
        with suppress(CheckpointError):  # a damaged manifest is reported when all ranks look at it
            return folder, checkpoint.read_manifest(folder, key)
    return output_dir, None


def find_checkpoint(
    config: CheckpointConfig, world_size: int, storage: StorageGroup, compare: Callable[[Path, Manifest], list[str]]
) -> ResumePoint | None:
    """Select the checkpoint to resume from, verified and readable by every rank; None for a new run. All ranks.

    Args:
        storage: which ranks share a file system with this one.
        compare: called on rank 0 with the checkpoint and its manifest; returns what differs, one line each, and raises
            CheckpointError where the run may not resume from it.

    Raises:
        CheckpointError: the requested checkpoint is damaged, or all are; it belongs to another run or world size.
        ConfigError: there is no such folder.
    """
    output_dir, inspected, key = config.output_dir, None, checkpoint.key_of(config.verify_key)
    if config.resume_from == "auto":
        inspected = _newest_complete(output_dir, storage, key, may_lack_random_state=config.allow_inexact)
    elif config.resume_from is not None:
        folder = Path(config.resume_from).expanduser()
        if not any(all_gather_object(folder.is_dir())):
            reason = "is a file: name the folder of a checkpoint" if folder.is_file() else "there is no such folder"
            raise ConfigError(f"--resume_from_checkpoint {folder}: {reason}")
        inspected = _inspect(folder, _ranks_that_see(folder, output_dir, storage), key)
    if inspected is None:
        return None
    folder, manifest, faults = inspected
    waived = [fault for fault in faults if config.allow_inexact and _is_missing_random_state(fault)]
    if manifest is None or len(waived) < len(faults):
        shown = f"--resume_from_checkpoint {folder}: is not intact, auto finds the newest one that is"
        raise CheckpointError(f"{shown}: {format_faults(faults, 'fault')}")
    if config.resume_from == "auto":
        run_on_rank_0(lambda: _check_run_id(output_dir, folder, manifest))
    changes = [*run_on_rank_0(lambda: compare(folder, manifest)), *waived]
    is_reshaped = manifest.world_size != world_size
    if is_reshaped and not storage.is_shared:
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, now there are {world_size}: to resume on another "
            "number of ranks all must see one folder: copy the parts of all hosts to a shared file system"
        )
    if is_reshaped != config.world_size_changes:
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, unlike the newer checkpoint, which is damaged and "
            "quarantined now: start the same command again"
        )
    _quarantine_later(output_dir, folder, manifest.step, storage)
    for line in (*changes, *_changed_versions(manifest)):
        logger.warning(f"changed since {folder.name} was written: {line}")
    logger.warning(f"resuming from {folder}, step {manifest.step}")
    return ResumePoint(folder, manifest, tuple(changes), is_reshaped)


class _Inspected(NamedTuple):
    """A checkpoint as all ranks see it: its manifest, None where that cannot be read, and all faults."""

    folder: Path
    manifest: Manifest | None
    faults: list[str]


def _newest_complete(
    output_dir: Path, storage: StorageGroup, key: bytes | None, *, may_lack_random_state: bool
) -> _Inspected | None:
    """Return the newest checkpoint that is complete on every file system; damaged ones are quarantined."""

    def list_steps() -> list[int]:
        with storage_errors(output_dir):
            for folder in checkpoint.remove_unfinished(output_dir):
                logger.warning(f"{folder}: its save was not finished: removed")
        return checkpoint.steps_in(output_dir)

    steps = sorted(set().union(*filter(None, storage.run_on_writers(list_steps))), reverse=True)
    had_manifest = []
    for step in steps:
        folder = checkpoint.checkpoint_folder(output_dir, step)
        had_manifest.append(any(all_gather_object(checkpoint.is_complete(folder))))
        inspected = _inspect(folder, storage.ranks, key)
        if may_lack_random_state and all(map(_is_missing_random_state, inspected.faults)) or not inspected.faults:
            return inspected
        renamed = storage.run_on_writers(partial(_quarantine, folder, "damaged"))
        logger.warning(
            f"{format_faults(inspected.faults, 'fault')}: {folder.name} is quarantined as "
            f"{next(filter(None, renamed)).name}"
        )
    finished_before = run_on_rank_0(lambda: run_json.known(output_dir).get("last_checkpoint"))
    if any(had_manifest) or finished_before is not None:
        raise CheckpointError(
            f"{output_dir}: no checkpoint is complete, and this run has saved some: to start again from step 0 choose "
            "another --output_dir, or give --overwrite_output_dir True without --resume_from_checkpoint"
        )
    if run_on_rank_0(lambda: run_json.known(output_dir).get("completed")):
        raise ConfigError(
            f"--output_dir {output_dir}: holds a complete run, and no checkpoint to resume from: choose another "
            "folder, or give --overwrite_output_dir True without --resume_from_checkpoint to move it aside"
        )
    logger.warning(f"{output_dir} holds no checkpoint yet: starting from step 0")
    return None


def _quarantine(folder: Path, reason: str) -> Path | None:
    with storage_errors(folder, f"{folder}: cannot be renamed"):
        return checkpoint.quarantine(folder, reason) if folder.exists() else None


def _check_run_id(output_dir: Path, folder: Path, manifest: Manifest) -> None:
    known = run_json.known(output_dir).get("run_id")
    if known is not None and known != manifest.run_id:
        raise CheckpointError(
            f"{folder} is of run {manifest.run_id}, {output_dir / run_json.RUN_FILE} of run {known}: to resume from "
            f"it, name it: --resume_from_checkpoint {folder}"
        )


def _inspect(folder: Path, ranks: tuple[int, ...], key: bytes | None) -> _Inspected:
    """Collect the faults that any rank finds; `ranks`, which see the same files, share the work. All ranks."""
    names = host_names()
    manifest, faults = _inspect_here(folder, ranks, key, all_files=len(ranks) == len(names))
    by_host = len(set(names)) > 1 and len(ranks) < len(names)
    of_all = all_gather_object([f"{fault} (on {names[get_rank()]})" if by_host else fault for fault in faults])
    return _Inspected(folder, manifest, list(dict.fromkeys(fault for of_rank in of_all for fault in of_rank)))


def _inspect_here(
    folder: Path, ranks: tuple[int, ...], key: bytes | None, *, all_files: bool
) -> tuple[Manifest | None, list[str]]:
    """Read the manifest, and verify this rank's part of the files."""
    try:
        manifest = checkpoint.read_manifest(folder, key)
    except CheckpointError as error:
        return None, [str(error)]
    needed = manifest.files if all_files else manifest.names_for(ranks)
    part = ranks.index(get_rank())
    names = checkpoint.partition_files(manifest, needed, part, len(ranks))
    faults = checkpoint.find_damage(folder, manifest, names)
    if part == 0:
        faults += checkpoint.find_strangers(folder, manifest)
    faults += _state_faults(folder / TRAINER_STATE, manifest) if TRAINER_STATE in names else []
    paths = [folder / name for name in names]
    pickled = [path for path in paths if checkpoint.is_pickled(path) and path.is_file()]
    return manifest, faults + [fault for path in pickled if (fault := checkpoint.pickle_fault(path))]


def _state_faults(path: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the Trainer's record, which transformers reads as it is."""
    try:
        values = json.loads(path.read_bytes())
        wrong = [name for name, hint in STATE_TYPES.items() if name in values and not has_type(values[name], hint)]
        step = values.get("global_step")
    except OSError:  # a fault that is named already
        return []
    except MALFORMED as error:
        return [f"{path} is not the Trainer's record: {str(error)[:80]}"]
    if wrong or step != manifest.step:
        return [f"{path} is not the Trainer's record of step {manifest.step}: {', '.join(wrong) or 'global_step'}"]
    return []


def _is_missing_random_state(fault: str) -> bool:
    """Without random states the numbers differ, and nothing else: `--allow_inexact_resume` may do without."""
    return re.search(r"/rng_state(_\d+)?\.pth is missing", fault) is not None


def _ranks_that_see(folder: Path, output_dir: Path, storage: StorageGroup) -> tuple[int, ...]:
    """Return the ranks that see the same files in `folder`: outside of output_dir, those of this host."""
    names = host_names()
    if folder.resolve().parent == output_dir.resolve():
        return storage.ranks
    return tuple(rank for rank, name in enumerate(names) if name == names[get_rank()])


def _changed_versions(manifest: Manifest) -> list[str]:
    """Libraries with another version now: most give the same numbers, and none promises to."""
    versions = run_json.library_versions()
    return [
        f"{name} {version}, now {versions.get(name, 'not installed')}"
        for name, version in manifest.versions.items()
        if versions.get(name) != version
    ]


def _quarantine_later(output_dir: Path, chosen: Path, step: int, storage: StorageGroup) -> None:
    """Rename checkpoints of later steps, which this run makes again."""
    if chosen.resolve().parent != output_dir.resolve():
        return

    def rename() -> list[Path]:
        later = [saved for saved in checkpoint.steps_in(output_dir) if saved > step]
        folders = [_quarantine(checkpoint.checkpoint_folder(output_dir, saved), "later") for saved in later]
        return [folder for folder in folders if folder is not None]

    for renamed in set().union(*filter(None, storage.run_on_writers(rename))):
        logger.warning(f"a later checkpoint than {chosen.name} is quarantined as {renamed.name}")
