"""Files that appear whole and outlive a crash."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from finetune.utils.errors import StorageError

# What network file systems say that cannot write a folder through; the file itself is on the disk.
UNKNOWN_TO_SOME_DISKS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def write_bytes_atomically(path: Path, text: str) -> None:
    """Replace a file whole: after a crash it holds the old text or the new, never a part.

    Raises:
        OSError: the disk refused.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_dir(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically`, of a file that its user knows.

    Raises:
        StorageError: the disk refused; what and where.
    """
    try:
        write_bytes_atomically(path, text)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None


def fsync_dir(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN_TO_SOME_DISKS:
            raise
    finally:
        os.close(descriptor)
