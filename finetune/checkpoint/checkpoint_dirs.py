"""The checkpoints of an output folder: which there are, which may be removed, which are set aside."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from finetune.checkpoint.integrity import find_damage
from finetune.checkpoint.manifest import MANIFEST_FILE, NAME, SAVING_FILE, read_manifest
from finetune.utils.atomic_io import fsync_dir, replace_text
from finetune.utils.errors import CheckpointError

# Before its mark lies in it, and after that is gone, a folder has a name that nobody takes for a checkpoint's.
COMING_OR_GOING = re.compile(r"\.checkpoint-\d+\.(coming|going)")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a folder, None where it has another name or is a link."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match and folder.is_dir() and not folder.is_symlink() else None


def steps_in(output_dir: Path) -> list[int]:
    """Steps of all folders that are named like a checkpoint, newest first, whole or not."""
    if not output_dir.is_dir():
        return []
    return sorted((step for one in output_dir.iterdir() if (step := step_of(one)) is not None), reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a manifest; whether its files are as that says is another question: `verify`."""
    return (folder / MANIFEST_FILE).is_file()


def verify_checkpoint(folder: Path) -> list[str]:
    """Every fault of a checkpoint, each naming its file; empty for a whole one.

    Where hosts kept files of their own, a folder is whole with those of any one of them, or of all.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = {name: fault for name in manifest.files if (fault := "".join(find_damage(folder, manifest, [name])))}
    everyone = [rank for disk in manifest.disks for rank in disk]
    parts = [everyone, *(manifest.disks if len(manifest.disks) > 1 else [])]
    return min(([found[name] for name in manifest.names_for(ranks) if name in found] for ranks in parts), key=len)


def latest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint of which every byte is as it was written."""
    folders = (checkpoint_folder(output_dir, step) for step in steps_in(output_dir))
    return next((folder for folder in folders if not verify_checkpoint(folder)), None)


def mark_as_unfinished(folder: Path, run_id: str, step: int) -> None:
    """Make the folder with the mark that a save is under way."""
    coming = folder.with_name(f".{folder.name}.coming")
    coming.mkdir(parents=True)
    replace_text(coming / SAVING_FILE, json.dumps({"run_id": run_id, "step": step}) + "\n")
    coming.rename(folder)
    fsync_dir(folder.parent)


def is_unfinished(folder: Path) -> bool:
    """Whether this is what a save, or a deletion, has left behind: it may be removed."""
    return step_of(folder) is not None and (folder / SAVING_FILE).is_file() and not is_complete(folder)


def remove_unfinished(output_dir: Path) -> list[Path]:
    """Remove what saves that did not finish have left behind.

    Raises:
        OSError: the disk refused.
    """
    for one in output_dir.iterdir() if output_dir.is_dir() else ():
        if COMING_OR_GOING.fullmatch(one.name) and one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
    left = [one for one in (checkpoint_folder(output_dir, step) for step in steps_in(output_dir)) if is_unfinished(one)]
    for folder in left:
        _remove(folder)
    return left


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint of ours: in one step it is none any more, then its files go.

    Raises:
        OSError: the disk refused.
    """
    if is_complete(folder):
        (folder / MANIFEST_FILE).replace(folder / SAVING_FILE)
        fsync_dir(folder)
    _remove(folder)


def _remove(folder: Path) -> None:
    """All files, the mark last: whatever interrupts this, the rest can be told from a checkpoint of the user's."""
    for entry in sorted(folder.iterdir()):
        if entry.name == SAVING_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    going = folder.with_name(f".{folder.name}.going")
    folder.rename(going)
    shutil.rmtree(going)


def rotate(output_dir: Path, *, run_id: str, keep: int | None, keep_also: Iterable[int] = ()) -> list[Path]:
    """Remove all but the newest `keep` checkpoints of this run; returns what was removed.

    Only folders that carry a manifest of this run are looked at, never links, and never the steps of `keep_also`.
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


def quarantine(folder: Path, why: str) -> Path:
    """Rename a folder so that it counts as a checkpoint no more; nothing in it is changed."""
    aside = folder.with_name(f"{folder.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    folder.rename(aside)
    fsync_dir(folder.parent)
    return aside
