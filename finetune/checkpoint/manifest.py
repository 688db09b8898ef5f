"""`manifest.json`: what a checkpoint is and every file of it; a folder without one is not a checkpoint.

    checkpoint-N/saving.json     written first: a save is under way, or the folder is being deleted
    checkpoint-N/...             the files
    checkpoint-N/manifest.json   written last, durably, once every rank's files are

Between the two a folder is ours to remove. Nothing is renamed over anything: ranks on other hosts may have the folder
open while one of them finishes it.
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
    """One file: bytes, xxh3-128 in hexadecimal, and the rank that it is of; None: every disk has one of its own."""

    size: int
    xxh3_128: str
    rank: int | None


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint.

    Attributes:
        run_id: of the run and of every run that went on from it.
        step: optimizer steps done.
        world_size: ranks that wrote it; `step_rows` is what a full step holds over all of them, rows or groups.
        position: where the sampler goes on: {"epoch": e, "step": s}, both counted from 0.
        loss_since_log: [ranks], what each rank has added up since step `last_logged`.
        parts_since_log: the same by source and answer, over all ranks; see `loss_parts`.
        facts: what must be the same for a resumed run to be the uninterrupted one.
        trained: names and whole shapes of all trained parameters.
        disks: the ranks of each disk: a list of lists, with one in it where all share a file system.
        non_finite: steps whose numbers were not finite up to here; see `training.nonfinite.NonFiniteCounter`.
        files: by path relative to the folder, those of all ranks; `names_for` says which are to be on a disk.
    """

    run_id: str
    step: int
    world_size: int
    step_rows: int
    position: dict[str, int]
    last_logged: int
    loss_since_log: list[float]
    facts: dict[str, Any]
    trained: dict[str, list[int]]
    versions: dict[str, str]
    disks: list[list[int]]
    written: str
    is_resumable: bool = True
    non_finite: dict[str, int] = field(default_factory=dict)
    parts_since_log: list[list[float]] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(one.size for one in self.files.values())

    def names_for(self, ranks: Collection[int]) -> list[str]:
        """The files that the disk of these ranks must hold."""
        return [name for name, record in self.files.items() if record.rank is None or record.rank in ranks]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is not one that this version reads.
    """
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: its save was not finished, or it was made by another tool") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    try:
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        manifest = Manifest(**values, files=files)
        _check(manifest, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}") from None
    return manifest


def _check(manifest: Manifest, folder: Path) -> None:
    """Raises: ValueError, with what does not fit."""
    for name, hint in get_type_hints(Manifest).items():
        if not isinstance(getattr(manifest, name), get_origin(hint) or hint):
            raise ValueError(f"{name} is {getattr(manifest, name)!r}")
    if len(manifest.loss_since_log) != manifest.world_size or not all(isinstance(one, list) for one in manifest.disks):
        raise ValueError("its ranks do not add up")
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
    """Seal a checkpoint: whole on the disk, then visible, and only then is the mark of a save taken away."""
    replace_text(folder / MANIFEST_FILE, json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n")
    (folder / SAVING_FILE).unlink(missing_ok=True)
    fsync_dir(folder)
