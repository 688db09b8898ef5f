"""Atomic, durable writes of small text files."""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.utils.errors import ConfigError, storage_errors

# What network file systems answer that cannot sync a folder; the file itself is on the disk.
FSYNC_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def replace_text(path: Path, text: str) -> None:
    """Replace the text of a file: after a crash it holds the old text or the new, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_dir(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """`replace_text` of a file whose path the user knows: a `StorageError` names it and the reason."""
    with storage_errors(path):
        replace_text(path, text)


@contextmanager
def replacing(path: Path, shown: str | None = None) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the place of `path` if the block succeeds; else nothing is left.

    A `StorageError` names the path, or what is `shown` for it.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with storage_errors(path, f"{shown or path}: cannot be written"):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        with suppress(OSError):  # it is in place, or was never made
            part.unlink()


def check_new(path: Path) -> None:
    """Check that nothing has the name of a file that is to be written, and that its folder is there."""
    if os.path.lexists(path):
        raise ConfigError(f"{path}: exists and is not replaced: name another file, or remove it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}: make it first")


def write_new(path: Path, text: str) -> None:
    """Write a file that must not be there yet."""
    check_new(path)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records as lines of standard JSON; a `StorageError` names the path and the reason."""
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def fsync_dir(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in FSYNC_NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
