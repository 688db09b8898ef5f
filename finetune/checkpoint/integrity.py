"""Sync, hash and verify the files of a checkpoint.

The checksum is XXH3 with 128 bits (https://github.com/Cyan4973/xxHash): it finds accidental damage at memory speed, and
does not prove where a checkpoint comes from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from finetune.checkpoint.manifest import MANIFEST_FILE, SAVING_FILE, FileRecord, Manifest
from finetune.utils.atomic_io import fsync_dir

CHUNK_BYTES = 4 << 20
FILES_AT_ONCE = 4


def checksum(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the XXH3-128 in hexadecimal of a file."""
    state, size, buffer = xxhash.xxh3_128(), 0, bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(view[:count])
            size += count
    return size, state.hexdigest()


def file_names(folder: Path) -> list[str]:
    """Return the relative paths of all files under a folder but the two marks, sorted; links are not followed."""
    paths = []
    for parent, _, names in os.walk(folder):
        paths += [str((Path(parent) / name).relative_to(folder)) for name in names]
    return sorted(set(paths) - {MANIFEST_FILE, SAVING_FILE, f"{MANIFEST_FILE}.partial"})


def fsync_and_hash(folder: Path, names: Iterable[str], rank: int | None) -> dict[str, FileRecord]:
    """Sync and hash the files of a rank; hashing runs while the disk still writes."""

    def sync_and_hash(name: str) -> tuple[str, FileRecord]:
        path = folder / name
        with ThreadPoolExecutor(1) as writing:
            durable = writing.submit(_sync, path)
            size, digest = checksum(path)
            durable.result()
        return name, FileRecord(size, digest, rank)

    names = list(names)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        records = dict(pool.map(sync_and_hash, names))
    for parent in {(folder / name).parent for name in names}:
        fsync_dir(parent)
    return records


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
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
        faults = list(pool.map(lambda name: _fault(folder / name, manifest.files[name]), selected))
    return [fault for fault in faults if fault]


def _fault(path: Path, record: FileRecord) -> str | None:
    try:
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != record.size:
            return f"{path} has {path.stat().st_size:,} bytes of {record.size:,}"
        size, digest = checksum(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if (size, digest) != (record.size, record.xxh3_128):
        return f"{path} has been changed since it was written: its checksum is {digest}, not {record.xxh3_128}"
    return None


def partition_files(manifest: Manifest, names: Iterable[str], part: int, of: int) -> list[str]:
    """Return the files that the `part`-th of `of` ranks verifies, so that all read about as many bytes."""
    loads, selected = [0] * of, []
    for name in sorted(names, key=lambda name: (-manifest.files[name].size, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += manifest.files[name].size + 1
        if lightest == part:
            selected.append(name)
    return selected
