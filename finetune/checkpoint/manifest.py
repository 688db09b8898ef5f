"""`manifest.json` names every file of a checkpoint; a folder without one is not a checkpoint.

    checkpoint-N/saving.json     written first: a save is in progress, or the folder is being removed
    checkpoint-N/...             the files
    checkpoint-N/manifest.json   written and synced last, once the files of every rank are

A folder with only the first may be removed. Nothing is renamed over a folder: ranks on other hosts may have it open.

A manifest carries a checksum of itself, its canonical JSON (sorted keys, no spaces). It finds accidents. With a key it
also carries an HMAC-SHA256 (RFC 2104) of the same bytes, and a SHA-256 of each file.
"""

import hmac
import json
import os
import re
import unicodedata
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from xxhash import xxh3_128_hexdigest

from finetune.utils.atomic_io import fsync_dir, replace_text
from finetune.utils.errors import CheckpointError, ConfigError
from finetune.utils.user_files import from_json, has_type, unique_keys

FORMAT = 1
MANIFEST_FILE = "manifest.json"
SAVING_FILE = "saving.json"
LATEST_FILE = "latest"  # names the folder of DeepSpeed's files
NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
TAG = re.compile(r"(global_step\d+)/")
MAX_REASON = 300
MIN_KEY = 16  # characters
DAY, STAGE = "date that the chat template writes", "ZeRO stage"  # names of facts
SKIPPED_ROWS = "rows left out by --skip_rows"
POSITION, COUNTS = {"epoch", "step"}, {"steps", "in_a_row", "lost_since_log"}


@dataclass(frozen=True)
class FileRecord:
    """One file: size in bytes, XXH3-128 in hexadecimal, and its rank; None: every file system has a copy of its own."""

    size: int
    xxh3_128: str
    rank: int | None
    sha256: str | None = None  # with --verify_key


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


def read_manifest(folder: Path, key: bytes | None = None) -> Manifest:
    """Read the manifest of a checkpoint.

    Args:
        key: of its HMAC; None: that is not checked.

    Raises:
        CheckpointError: there is none, it is damaged or of another key, or this version cannot read it.
    """
    path = folder / MANIFEST_FILE
    try:
        if not path.exists():
            raise CheckpointError(f"{path} is missing: its save was not finished, or it was made by another tool")
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is a link or no file")
        values = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise CheckpointError(f"{path}: format {shortened(found)}, this version reads {FORMAT}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:MAX_REASON]}") from None
    try:
        sums = {name: values.pop(name, None) for name in ("checksum", "hmac_sha256")}
        text = _canonical(values)
        del values["format"]
        files = {
            name: from_json(FileRecord, record, f"{shortened(name)[1:-1]}:") for name, record in values["files"].items()
        }
        manifest = from_json(Manifest, {**values, "files": files}, "its")
        _check(manifest, folder)
        if sums["checksum"] not in (None, xxh3_128_hexdigest(text)):  # manifests of 0.1 have none
            raise ValueError("it has been changed since it was written: its checksum is of another text")
        if key is not None and not hmac.compare_digest(str(sums["hmac_sha256"]).encode(), _hmac(key, text).encode()):
            raise ValueError("its HMAC is missing, or is not that of the key in --verify_key")
        if key is not None and None in {record.sha256 for record in files.values()}:
            raise ValueError("it has no SHA-256 of its files")
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest: {str(error)[:MAX_REASON]}") from None
    return manifest


def key_of(variable: str | None) -> bytes | None:
    """Return the key that the environment variable of --verify_key holds; None without the flag.

    Raises:
        ConfigError: there is no such variable here, or what it holds can be guessed.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").encode()
    if len(key) < MIN_KEY:  # the name is not repeated: it may be the key itself
        raise ConfigError(
            f"--verify_key: expected the name of an environment variable with a key of at least {MIN_KEY} characters, "
            "set on every host"
        )
    return key


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _hmac(key: bytes, text: bytes) -> str:
    return hmac.digest(key, text, "sha256").hex()


def _check(manifest: Manifest, folder: Path) -> None:
    """Check values.

    Raises:
        ValueError: with what does not fit.
    """
    ranks = sorted(rank for group in manifest.disks for rank in group)
    if not len(manifest.loss_since_log) == manifest.world_size > 0 or ranks != list(range(manifest.world_size)):
        raise ValueError("its ranks and world size do not match")
    if set(manifest.position) != POSITION or not set(manifest.non_finite) <= COUNTS:
        raise ValueError("its position or its counts of non-finite steps lack a name, or have another")
    if not all(_is_plain(name) and "/" not in name for name in manifest.trained):
        raise ValueError("its trained parameters have names that are paths")
    facts = manifest.facts
    if not has_type(facts.get(SKIPPED_ROWS, []), list[str]) or facts.get(STAGE, "none") not in ("none", 0, 1, 2, 3):
        raise ValueError("its facts hold an unknown ZeRO stage, or rows that are no names")
    if DAY in facts:
        date.fromisoformat(facts[DAY])
    match = NAME.fullmatch(folder.name)
    if match and int(match[1]) != manifest.step:
        raise ValueError(f"it is of step {manifest.step}: give the folder its name, or none of a checkpoint's")
    folded = {unicodedata.normalize("NFC", name).casefold() for name in manifest.files}
    if len(folded) != len(manifest.files) or folded & {MANIFEST_FILE, SAVING_FILE}:
        raise ValueError("its names of files differ only in case, or one is the manifest's own")
    for name, record in manifest.files.items():
        if not _is_plain(name):
            raise ValueError(f"{repr(name)[1:-1]} lies outside, or is no plain relative path")
        if record.size < 0:
            raise ValueError(f"{name} has {record.size} bytes")


def _is_plain(name: str) -> bool:
    """Whether a name is a normalised relative path that every file system can hold."""
    is_text = name.isprintable() and "\\" not in name
    return is_text and all(part and part[-1] not in ". " for part in name.split("/"))


def write_manifest(folder: Path, manifest: Manifest, key: bytes | None = None) -> None:
    """Write the manifest atomically, then remove the mark of the save: from now on the folder is a checkpoint."""
    values = {"format": FORMAT, **asdict(manifest)}
    for record in values["files"].values():
        if record["sha256"] is None:
            del record["sha256"]
    text = _canonical(values)
    sums = {"checksum": xxh3_128_hexdigest(text)} | ({} if key is None else {"hmac_sha256": _hmac(key, text)})
    replace_text(folder / MANIFEST_FILE, json.dumps({**values, **sums}, indent=1) + "\n")
    (folder / SAVING_FILE).unlink(missing_ok=True)
    fsync_dir(folder)
