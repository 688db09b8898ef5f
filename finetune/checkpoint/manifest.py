"""`manifest.json` names every file of a checkpoint; a folder without one is not a checkpoint.

    checkpoint-N/saving.json     written first: a save is in progress, or the folder is being removed
    checkpoint-N/...             the files
    checkpoint-N/manifest.json   written and synced last, once the files of every rank are

A folder with only the first may be removed. Nothing is renamed over a folder: ranks on other hosts may have it open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from finetune.utils.atomic_io import fsync_dir, replace_text
from finetune.utils.errors import CheckpointError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
SAVING_FILE = "saving.json"
NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")


@dataclass(frozen=True)
class FileRecord:
    """One file: size in bytes, XXH3-128 in hexadecimal, and its rank; None: every file system has a copy of its own."""

    size: int
    xxh3_128: str
    rank: int | None


@dataclass(frozen=True)
class Manifest:
    """A checkpoint: the run, the step, where the data continues, and its files."""

    run_id: str  # of the run and of every run that resumed from it
    step: int  # optimizer steps done
    world_size: int  # ranks that wrote it
    step_rows: int  # rows or groups of a full step over all ranks
    position: dict[str, int]  # of the sampler: {"epoch": e, "step": s}, both counted from 0
    last_logged: int
    loss_since_log: list[float]  # [ranks], what each rank has summed since step `last_logged`
    facts: dict[str, Any]  # what a resumed run must have in common to equal the uninterrupted one
    trained: dict[str, list[int]]  # names and whole shapes of all trained parameters
    versions: dict[str, str]
    disks: list[list[int]]  # the ranks of each file system, a single list where all share it
    written: str
    is_resumable: bool = True
    non_finite: dict[str, int] = field(default_factory=dict)  # see `training.nonfinite.NonFiniteCounter`
    parts_since_log: list[list[float]] = field(default_factory=list)  # `loss_since_log` by cell of the breakdown
    files: dict[str, FileRecord] = field(default_factory=dict)  # of all ranks, by path relative to the folder

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def names_for(self, ranks: Collection[int]) -> list[str]:
        """Return the files that the file system of these ranks must hold."""
        return [name for name, record in self.files.items() if record.rank is None or record.rank in ranks]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or this version cannot read it.
    """
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: its save was not finished, or it was made by another tool") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    file_format = values.pop("format", None) if isinstance(values, dict) else None
    if file_format != FORMAT:
        raise CheckpointError(f"{path}: format {file_format}, this version reads {FORMAT}")
    try:
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        manifest = Manifest(**values, files=files)
        _check(manifest, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}") from None
    return manifest


def _check(manifest: Manifest, folder: Path) -> None:
    """Check types and values.

    Raises:
        ValueError: with what does not fit.
    """
    for name, hint in get_type_hints(Manifest).items():
        if not isinstance(getattr(manifest, name), get_origin(hint) or hint):
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")
    if len(manifest.loss_since_log) != manifest.world_size or not all(
        isinstance(ranks, list) for ranks in manifest.disks
    ):
        raise ValueError("its ranks and world size do not match")
    match = NAME.fullmatch(folder.name)
    if match and int(match[1]) != manifest.step:
        raise ValueError(f"it is of step {manifest.step}: give the folder its name, or none of a checkpoint's")
    for name, record in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name} lies outside")
        if not isinstance(record.size, int) or not isinstance(record.xxh3_128, str):
            raise ValueError(f"{name} has no size or checksum")
        if not isinstance(record.rank, int | None):
            raise ValueError(f"{name} is of rank {record.rank!r}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically, then remove the mark of the save: from now on the folder is a checkpoint."""
    replace_text(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n")
    (folder / SAVING_FILE).unlink(missing_ok=True)
    fsync_dir(folder)
