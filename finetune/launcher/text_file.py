"""The lines of a small text file that a person wrote, or an error that names the path and what is there instead."""

from __future__ import annotations

import os
import re
import stat
from difflib import get_close_matches
from pathlib import Path

from finetune.utils.errors import ConfigError

# A hostfile of 10,000 hosts has a quarter of it; what is larger is another file, named by mistake.
MAX_BYTES = 1 << 20
SHOWN_NAMES = 3


def read_small_file(path: Path, noun: str, otherwise: str = "") -> tuple[list[tuple[int, bytes]], os.stat_result]:
    """(line number from 1, its bytes without the line end) of every line, and what the system says of the open file.

    LF, CRLF and CR end a line; a UTF-8 byte order mark in front is left out. `noun` names the kind of file in errors,
    `otherwise` ends the one that says it is not there.

    Raises:
        ConfigError: no such file (with the names beside it that are like it), not a regular file, unreadable, too big.
    """
    try:
        # Not blocking: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(_missing(path, noun) + otherwise) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{noun} {path} cannot be read: {_reason(error)}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise ConfigError(f"{noun} {path} is {kind}: expected a file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{noun} {path} cannot be read: {_reason(error)}") from error
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{noun} {path} is larger than {MAX_BYTES:,} bytes: is it the right file?")
    lines = re.split(rb"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf"))
    return list(enumerate(lines, start=1)), status


def text_of(raw: bytes) -> str | None:
    """A line without the blanks around it; None for a comment or an empty one. Raises ValueError: not UTF-8."""
    try:
        line = raw.decode("utf-8").strip(" \t")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text: save the file as plain text") from None
    return None if not line or line.startswith("#") else line


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _missing(path: Path, noun: str) -> str:
    place = path.absolute().parent
    if not place.is_dir():
        return f"{noun} {path}: there is no folder {place}"
    try:
        names = sorted(entry.name for entry in os.scandir(place) if entry.is_file())
    except OSError:
        names = []
    close = get_close_matches(path.name, names, n=SHOWN_NAMES, cutoff=0.5)
    hint = f": did you mean {' or '.join(close)}?" if close else ""
    return f"{noun} {path}: there is no such file in {place}{hint}"
