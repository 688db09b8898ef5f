"""A page as a file: whole or not there, and never in the place of a file that is none of ours."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.utils.errors import ConfigError, StorageError

PREVIEW, REPORT = "finetune preview", "finetune report"
BYTES_UP_TO_THE_MARK = 1024


def mark(generator: str) -> str:
    """What a page carries near its beginning, so that it is known again."""
    return f'<meta name="generator" content="{generator}">'


def check_replaceable(path: Path, generator: str = PREVIEW) -> None:
    """Refuse a file that a page must not be written over.

    Raises:
        ConfigError: it exists and was not made by `generator`, or is not a file.
    """
    try:
        with open(path, "rb") as file:
            ours = mark(generator).encode() in file.read(BYTES_UP_TO_THE_MARK)
    except (FileNotFoundError, NotADirectoryError):  # nothing to replace; `write_page` says what hinders it
        return
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be replaced: {error.strerror}") from None
    if not ours:
        raise ConfigError(f"--html {path}: was not made by {generator} and is not replaced: name another file")


def write_page(path: Path, html: str, generator: str = PREVIEW) -> None:
    """Write the page whole or not at all; folders above it are made.

    Raises:
        ConfigError: as `check_replaceable`.
        StorageError: it cannot be written.
    """
    check_replaceable(path, generator)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(html, encoding="utf-8", errors="backslashreplace", newline="\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"--html {path}: cannot be written: {error.strerror}") from error
