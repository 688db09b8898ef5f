"""Checkpoint folders of an `output_dir`: naming, listing, marking, removing by rules, quarantine."""

import json
import re
import shutil
import time
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path

from finetune.checkpoint.integrity import find_damage, find_strangers
from finetune.checkpoint.manifest import MANIFEST_FILE, NAME, SAVING_FILE, read_manifest
from finetune.utils.atomic_io import fsync_dir, replace_text
from finetune.utils.errors import CheckpointError

# Before it has its mark, and after the mark is removed, a folder has a name that is no checkpoint's.
TEMPORARY_NAME = re.compile(r"\.checkpoint-\d+\.(coming|going)")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a folder; None for another name or a link."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() and not folder.is_symlink() else None


def steps_in(output_dir: Path) -> list[int]:
    """Return the steps of all folders named like a checkpoint, newest first, complete or not."""
    if not output_dir.is_dir():
        return []
    return sorted((step for folder in output_dir.iterdir() if (step := step_of(folder)) is not None), reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a manifest. Whether its files match is up to `verify_checkpoint`."""
    return (folder / MANIFEST_FILE).is_file()


def verify_checkpoint(folder: Path, key: bytes | None = None) -> list[str]:
    """Return every fault of a checkpoint, each naming its file; empty for a complete one.

    Where hosts kept files of their own, a folder is complete with those of any one of them, or of all.
    """
    try:
        manifest = read_manifest(folder, key)
    except CheckpointError as error:
        return [str(error)]
    faults = {name: fault for name in manifest.files if (fault := "".join(find_damage(folder, manifest, [name])))}
    all_ranks = [rank for ranks in manifest.disks for rank in ranks]
    parts = [all_ranks, *(manifest.disks if len(manifest.disks) > 1 else [])]
    damage = min(([faults[name] for name in manifest.names_for(ranks) if name in faults] for ranks in parts), key=len)
    return damage + find_strangers(folder, manifest)


def mark_as_unfinished(folder: Path, run_id: str, step: int) -> None:
    """Create the folder with the mark that a save is in progress."""
    temporary = folder.with_name(f".{folder.name}.coming")
    temporary.mkdir(parents=True)
    replace_text(temporary / SAVING_FILE, json.dumps({"run_id": run_id, "step": step}) + "\n")
    temporary.rename(folder)
    fsync_dir(folder.parent)


def is_unfinished(folder: Path) -> bool:
    """Whether an interrupted save or removal left this folder: it may be removed."""
    return step_of(folder) is not None and (folder / SAVING_FILE).is_file() and not is_complete(folder)


def remove_unfinished(output_dir: Path) -> list[Path]:
    """Remove the folders of interrupted saves and removals; return those that were named like a checkpoint."""
    for entry in output_dir.iterdir() if output_dir.is_dir() else ():
        if TEMPORARY_NAME.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
    folders = [checkpoint_folder(output_dir, step) for step in steps_in(output_dir)]
    unfinished = [folder for folder in folders if is_unfinished(folder)]
    for folder in unfinished:
        _remove(folder)
    return unfinished


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: its manifest becomes the mark in one step, then its files are removed."""
    if is_complete(folder):
        (folder / MANIFEST_FILE).replace(folder / SAVING_FILE)
        fsync_dir(folder)
    _remove(folder)


def _remove(folder: Path) -> None:
    """Remove all files, the mark last: what an interruption leaves is never mistaken for a user's checkpoint."""
    for entry in sorted(folder.iterdir()):
        if entry.name == SAVING_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    temporary = folder.with_name(f".{folder.name}.going")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def rotate(output_dir: Path, *, run_id: str, keep: int | None, keep_also: Iterable[int] = ()) -> list[Path]:
    """Remove all but the newest `keep` checkpoints of this run; return what was removed.

    Only folders with a manifest of this run count, never links, and never the steps in `keep_also`.
    """
    if not keep:
        return []
    ours = []
    for step in steps_in(output_dir):
        folder = checkpoint_folder(output_dir, step)
        if is_complete(folder) and _run_of(folder) == run_id:
            ours.append((step, folder))
    spared = set(keep_also)
    surplus = [folder for step, folder in ours[keep:] if step not in spared]
    for folder in reversed(surplus):
        remove_checkpoint(folder)
    return surplus


def _run_of(folder: Path) -> str | None:
    try:
        return read_manifest(folder).run_id
    except CheckpointError:
        return None


def quarantine(folder: Path, reason: str) -> Path:
    """Rename a folder so that it no longer counts as a checkpoint; nothing in it changes."""
    name = f"{folder.name}.{reason}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    renamed = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(renamed)
    fsync_dir(folder.parent)
    return renamed
