"""Sync, hash and verify the files of a checkpoint.

The checksum is XXH3 with 128 bits (https://github.com/Cyan4973/xxHash): it finds accidental damage at memory speed, and
does not prove where a checkpoint comes from. SHA-256, beside it where the manifest has an HMAC, does.
"""

import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from finetune.checkpoint.manifest import LATEST_FILE, MANIFEST_FILE, SAVING_FILE, TAG, FileRecord, Manifest
from finetune.run_dir import eval_results
from finetune.utils.atomic_io import fsync_dir
from finetune.utils.errors import CheckpointError

CHUNK_BYTES = 4 << 20
FILES_AT_ONCE = 4
MARKS = {MANIFEST_FILE, SAVING_FILE, f"{MANIFEST_FILE}.partial"}
# What training, transformers or peft open by themselves when it lies in the folder of a model or a checkpoint.
LOADABLE = (
    "latest", ".pt", ".pth", ".bin", ".pkl", ".ckpt", ".safetensors", ".json", ".py", ".jinja", ".model",
    "vocab.txt", "merges.txt",
)  # fmt: skip


def record_file(file: BinaryIO, rank: int | None, *, with_sha256: bool) -> FileRecord:
    """Read a file to its end; return its size and checksums."""
    sums: list[Any] = [xxhash.xxh3_128(), *([hashlib.sha256()] if with_sha256 else [])]
    size, buffer = 0, bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        for state in sums:
            state.update(view[:count])
        size += count
    return FileRecord(size, sums[0].hexdigest(), rank, sums[1].hexdigest() if with_sha256 else None)


def file_names(folder: Path) -> list[str]:
    """Return the relative paths of all files under a folder but the two marks, sorted; links are not followed."""
    paths = []
    for parent, _, names in os.walk(folder):
        paths += [str((Path(parent) / name).relative_to(folder)) for name in names]
    return sorted(set(paths) - MARKS)


def fsync_and_hash(
    folder: Path, names: Iterable[str], rank: int | None, *, with_sha256: bool = False
) -> dict[str, FileRecord]:
    """Sync and hash the files of a rank; hashing runs while the disk still writes.

    Who may read the folder may read the files: safetensors (from 0.7) makes files that only their owner reads.
    """
    readable = folder.stat().st_mode & 0o666

    def sync_and_hash(name: str) -> tuple[str, FileRecord]:
        path = folder / name
        with ThreadPoolExecutor(1) as writing:
            durable = writing.submit(_sync, path, readable)
            with path.open("rb", buffering=0) as file:
                record = record_file(file, rank, with_sha256=with_sha256)
            durable.result()
        return name, record

    names = list(names)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        records = dict(pool.map(sync_and_hash, names))
    for parent in {(folder / name).parent for name in names}:
        fsync_dir(parent)
    return records


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        if mode & ~status.st_mode and status.st_uid == os.geteuid():
            with suppress(PermissionError):  # of a file system that keeps no modes
                os.fchmod(descriptor, status.st_mode | mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """Return what differs from the manifest, each fault naming its file.

    Args:
        names: the files to verify; ranks share the work. None: all.
    """
    selected = manifest.files if names is None else names
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        faults = list(pool.map(lambda name: _fault(folder, name, manifest.files[name]), selected))
    return [fault for fault in faults if fault]


def _fault(folder: Path, name: str, record: FileRecord) -> str | None:
    try:
        open_verified(folder, name, record).close()
    except CheckpointError as error:
        return str(error)
    return None


def open_verified(folder: Path, name: str, record: FileRecord) -> BinaryIO:
    """Open a file once, and compare all its bytes with its record; what is read from it then is what was verified.

    Raises:
        CheckpointError: it is missing or a link, cannot be read, or differs from its record.
    """
    path, file = folder / name, None
    try:
        if os.path.realpath(path) != os.path.join(os.path.realpath(folder), name):
            raise CheckpointError(f"{path} is a link, or lies behind one: a checkpoint holds files only")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != record.size:
            raise CheckpointError(f"{path} has {status.st_size:,} bytes of {record.size:,}")
        found = record_file(file, record.rank, with_sha256=record.sha256 is not None)
        if found != record:
            raise CheckpointError(
                f"{path} has been changed since it was written: its checksum is {found.xxh3_128}, not {record.xxh3_128}"
            )
        file.seek(0)
    except (OSError, CheckpointError) as error:
        if file is not None:
            file.close()
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return file


def find_strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Return links, files that a loader could open and the manifest does not name, and a `latest` of other files."""
    faults, known = [], {*manifest.files, *MARKS, *eval_results.FILES}
    for parent, folders, names in os.walk(folder):
        for path in sorted(Path(parent) / name for name in (*folders, *names)):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                faults.append(f"{path} is a link: a checkpoint holds files only")
            elif path.name in names and name not in known and ("/" in name or name.lower().endswith(LOADABLE)):
                faults.append(f"{path} is not in {MANIFEST_FILE}")
    try:
        zero_tag(folder, manifest)
    except CheckpointError as error:
        faults += [] if find_damage(folder, manifest, {LATEST_FILE} & set(manifest.files)) else [str(error)]
    return faults


def zero_tag(folder: Path, manifest: Manifest) -> str | None:
    """Return the name of the folder of DeepSpeed's files; None: the checkpoint has none.

    Raises:
        CheckpointError: `latest` is damaged, or does not name the one folder that the manifest has.
    """
    tags = {match[1] for name in manifest.files if (match := TAG.match(name))}
    if not tags and LATEST_FILE not in manifest.files:
        return None
    if len(tags) != 1 or LATEST_FILE not in manifest.files:
        raise CheckpointError(f"{folder / LATEST_FILE}: the manifest names the files of {len(tags)} ZeRO states")
    with open_verified(folder, LATEST_FILE, manifest.files[LATEST_FILE]) as file:
        text = file.read(80)
    (tag,) = tags
    if text != tag.encode():
        raise CheckpointError(f"{folder / LATEST_FILE} holds {text!r}, not {tag}, whose files the manifest names")
    return tag


def partition_files(manifest: Manifest, names: Iterable[str], part: int, of: int) -> list[str]:
    """Return the files that the `part`-th of `of` ranks verifies, so that all read about as many bytes."""
    loads, selected = [0] * of, []
    for name in sorted(names, key=lambda name: (-manifest.files[name].size, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += manifest.files[name].size + 1
        if lightest == part:
            selected.append(name)
    return selected
