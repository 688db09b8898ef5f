"""Select the checkpoint to resume from: all ranks settle on the newest complete one before any weights are loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.checkpoint.manifest import Manifest
from finetune.config.run_config import CheckpointConfig, SavedStep
from finetune.distributed.collectives import (
    StorageGroup,
    all_gather_object,
    get_rank,
    host_names,
    run_on_all_ranks,
    run_on_rank_0,
)
from finetune.run_dir import run_json
from finetune.utils.errors import CheckpointError, ConfigError, StorageError, format_faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that all ranks have found whole, and what is not as it was."""

    folder: Path
    manifest: Manifest
    changes: tuple[str, ...]
    is_reshaped: bool

    def folder_to_load(self, output_dir: Path) -> Path:
        """The checkpoint's, or that of its form for another number of ranks; all ranks.

        Raises:
            CheckpointError: it cannot be converted.
            StorageError: there is no room for it.
        """
        if not self.is_reshaped or self.manifest.facts["ZeRO stage"] == "none":
            return self.folder
        target = checkpoint.universal_folder(output_dir, self.manifest.step)
        run_on_rank_0(lambda: checkpoint.convert_to_universal(self.folder, self.manifest, target))
        return target

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "step": self.manifest.step,
            "from": str(self.folder),
            "at": run_json.now(),
            "changes": list(self.changes),
        }


def saved_step(output_dir: Path, resume_from: str | None, *, any_world_size: bool, world_size: int) -> SavedStep | None:
    """Return the step of the checkpoint to resume from, where it is from another number of ranks, which is allowed.

    It is read before ranks can ask each other, because DeepSpeed's config holds the size of a batch.
    """
    if resume_from is None or not any_world_size:
        return None
    folders = [Path(resume_from).expanduser()]
    if resume_from == "auto":
        folders = [checkpoint.checkpoint_folder(output_dir, step) for step in checkpoint.steps_in(output_dir)]
    for folder in filter(checkpoint.is_complete, folders):
        with suppress(CheckpointError):  # a damaged manifest is reported when all ranks look at it
            manifest = checkpoint.read_manifest(folder)
            return SavedStep(manifest.world_size, manifest.step_rows) if manifest.world_size != world_size else None
    return None


def find_checkpoint(
    config: CheckpointConfig, world_size: int, disk: StorageGroup, compare: Callable[[Path, Manifest], list[str]]
) -> ResumePoint | None:
    """Select the checkpoint to resume from, verified and readable by every rank; None for a new run. All ranks.

    Args:
        disk: which ranks share a file system with this one.
        compare: called on rank 0 with the checkpoint and its manifest; returns what differs, one line each, and raises
            CheckpointError where the run may not resume from it.

    Raises:
        CheckpointError: the requested checkpoint is damaged, or all are; it belongs to another run or world size.
        ConfigError: there is no such folder.
    """
    asked, output_dir = config.resume_from, config.output_dir
    if asked is None:
        return None
    if asked == "auto":
        folder, faults = _newest_whole(output_dir, disk, may_lack_random_state=config.allow_inexact)
    else:
        folder = _the_one(Path(asked).expanduser())
        faults = _all_faults(folder, _sharing(folder, output_dir, disk))
    if folder is None:
        return None
    waived = [fault for fault in faults if config.allow_inexact and _is_missing_random_state(fault)]
    if len(waived) < len(faults):
        raise CheckpointError(f"--resume_from_checkpoint {folder}: {format_faults(faults, 'fault')}")
    manifest = checkpoint.read_manifest(folder)
    if asked == "auto":
        run_on_rank_0(lambda: _check_run_id(output_dir, folder, manifest))
    changes = [*run_on_rank_0(lambda: compare(folder, manifest)), *waived]
    is_reshaped = manifest.world_size != world_size
    if is_reshaped and not disk.is_shared:
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, now there are {world_size}: to go on on "
            "another number of ranks all must see one folder: copy the parts of all hosts to a shared file system"
        )
    if is_reshaped != config.world_size_changes:
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, unlike the newer one, which is damaged and out of "
            "the way now: start the same command again"
        )
    _set_later_aside(output_dir, folder, manifest.step, disk)
    for line in (*changes, *_other_versions(manifest)):
        logger.warning(f"not as it was when {folder.name} was written: {line}")
    logger.warning(f"going on from {folder}, step {manifest.step}")
    return ResumePoint(folder, manifest, tuple(changes), is_reshaped)


def _newest_whole(
    output_dir: Path, disk: StorageGroup, *, may_lack_random_state: bool
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole on every disk, with the faults it may have; damaged ones are set aside."""

    def look() -> list[int]:
        if not disk.is_writer:
            return []
        try:
            for left in checkpoint.remove_unfinished(output_dir):
                logger.warning(f"{left}: its save was not finished: removed")
        except OSError as error:
            raise StorageError(f"{output_dir}: {error}") from None
        return checkpoint.steps_in(output_dir)

    steps = sorted(set().union(*run_on_all_ranks(look)), reverse=True)
    was_sealed = []
    for step in steps:
        folder = checkpoint.checkpoint_folder(output_dir, step)
        was_sealed.append(any(all_gather_object(checkpoint.is_complete(folder))))
        faults = _all_faults(folder, disk.ranks)
        if may_lack_random_state and all(map(_is_missing_random_state, faults)) or not faults:
            return folder, faults
        aside = run_on_all_ranks(lambda folder=folder: _set_aside(folder, "damaged") if disk.is_writer else None)
        logger.warning(
            f"{format_faults(faults, 'fault')}: {folder.name} is set aside as {next(filter(None, aside)).name}"
        )
    sealed_once = run_on_rank_0(lambda: run_json.last_checkpoint(output_dir))
    if any(was_sealed) or sealed_once is not None:
        raise CheckpointError(
            f"{output_dir}: no checkpoint is whole, and this run has had some: to start again from step 0 choose "
            "another --output_dir, or give --overwrite_output_dir True without --resume_from_checkpoint"
        )
    if run_on_rank_0(lambda: run_json.is_complete(output_dir)):
        raise ConfigError(
            f"--output_dir {output_dir}: holds a run that is complete, and no checkpoint to go on from: choose another "
            "folder, or give --overwrite_output_dir True without --resume_from_checkpoint to move it aside"
        )
    logger.warning(f"{output_dir} holds no checkpoint yet: starting from step 0")
    return None, []


def _set_aside(folder: Path, why: str) -> Path | None:
    try:
        return checkpoint.quarantine(folder, why) if folder.exists() else None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be set aside: {error.strerror}") from None


def _the_one(folder: Path) -> Path:
    there = all_gather_object(folder.is_dir())
    if not any(there):
        raise ConfigError(f"--resume_from_checkpoint {folder}: there is no such folder")
    return folder


def _check_run_id(output_dir: Path, folder: Path, manifest: Manifest) -> None:
    known = run_json.run_id(output_dir)
    if known is not None and known != manifest.run_id:
        raise CheckpointError(
            f"{folder} is of run {manifest.run_id}, {output_dir / run_json.RUN_FILE} of run {known}: to go on from it, "
            f"name it: --resume_from_checkpoint {folder}"
        )


def _all_faults(folder: Path, sharing: tuple[int, ...]) -> list[str]:
    """Faults that any rank finds; those that see the same files share the work. None: every rank can read its part."""
    names = host_names()
    found = _faults_here(folder, sharing, all_of_it=len(sharing) == len(names))
    several = len(set(names)) > 1 and len(sharing) < len(names)
    every = all_gather_object([f"{fault} (on {names[get_rank()]})" if several else fault for fault in found])
    return list(dict.fromkeys(fault for faults in every for fault in faults))


def _faults_here(folder: Path, sharing: tuple[int, ...], *, all_of_it: bool) -> list[str]:
    try:
        manifest = checkpoint.read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    needed = manifest.files if all_of_it else manifest.names_for(sharing)
    part = sharing.index(get_rank())
    names = checkpoint.partition_files(manifest, needed, part, len(sharing))
    found = checkpoint.find_damage(folder, manifest, names)
    if part == 0:
        unlisted = set(checkpoint.file_names(folder)) - set(manifest.files)
        found += [
            f"{folder / name} is not in {checkpoint.MANIFEST_FILE}"
            for name in sorted(unlisted)
            if checkpoint.is_pickled(Path(name))
        ]
    for path in (folder / name for name in names):
        if checkpoint.is_pickled(path) and path.is_file():
            try:
                fault = checkpoint.pickle_fault(path)
            except OSError as error:
                fault = f"{path} cannot be read: {error.strerror}"
            found += [fault] if fault else []
    return found


def _is_missing_random_state(fault: str) -> bool:
    """Without it the numbers differ, and nothing else: `--allow_inexact_resume` may do without."""
    return re.search(r"/rng_state(_\d+)?\.pth is missing", fault) is not None


def _sharing(folder: Path, output_dir: Path, disk: StorageGroup) -> tuple[int, ...]:
    """The ranks that see the same files in `folder` as this one: elsewhere than in output_dir, those of its host."""
    names = host_names()
    if folder.resolve().parent == output_dir.resolve():
        return disk.ranks
    return tuple(rank for rank, name in enumerate(names) if name == names[get_rank()])


def _other_versions(manifest: Manifest) -> list[str]:
    """Libraries that have another version now: most give the same numbers, and none promises to."""
    here = run_json.library_versions()
    return [
        f"{name} {version}, now {here.get(name, 'not installed')}"
        for name, version in manifest.versions.items()
        if here.get(name) != version
    ]


def _set_later_aside(output_dir: Path, chosen: Path, step: int, disk: StorageGroup) -> None:
    """Checkpoints behind the chosen one are of steps that this run will make anew."""
    if chosen.resolve().parent != output_dir.resolve():
        return

    def rename() -> list[Path]:
        if not disk.is_writer:
            return []
        later = [one for one in checkpoint.steps_in(output_dir) if one > step]
        return [_set_aside(checkpoint.checkpoint_folder(output_dir, one), "later") for one in later]

    for aside in set().union(*run_on_all_ranks(rename)):
        logger.warning(f"a later checkpoint than {chosen.name} is set aside as {aside.name}")
