"""`.deepspeed_env`: environment variables for the ranks of every host.

    # comment
    NCCL_SOCKET_IFNAME=eth0
    export HF_HOME="/shared/hub cache"

The launcher splits each line at its first `=` and inserts both parts in a remote shell command (`add_export` in
deepspeed/launcher/multinode_runner.py, 0.19.8). Here a line is a name and a value, and nothing in it is executed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from finetune.launcher.env_variables import is_exported
from finetune.launcher.hostfile import decode_line, read_small_file
from finetune.utils.errors import ConfigError, StorageError, format_faults

ENVIRONMENT_FILE = ".deepspeed_env"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPORT = re.compile(r"export[ \t]+")
SHOWN_OF_NAME, SHOWN_OF_LINE = 8, 4  # characters; the text before a missing "=" may be a password


def read_environment_file(path: str | PathLike[str]) -> dict[str, str]:
    """Return name -> value, in the order of the file; the last line of a name counts.

    Quotes around a whole value and blanks at its end are removed; everything else is kept literally. A file that others
    can write, or of another user, is an error. No error shows a value.
    """
    path = Path(path)
    lines, status = read_small_file(path, "environment file")
    _check_owner(path, status)
    values: dict[str, str] = {}
    faults = []
    for number, raw in lines:
        try:
            values.update(_parse_line(raw))
        except ValueError as error:
            faults.append(f"{path}, line {number}: {error}")
    if faults:
        raise ConfigError(format_faults(faults, "bad environment line"))
    return values


def write_environment_file(path: Path, values: Mapping[str, str]) -> Path | None:
    """Write lines that the launcher can read, too (no comment, no blank line), and keep a copy of the former file.

    Returns the path of the copy; None if there was no file.
    """
    text = "".join(f"{name}={value}\n" for name, value in values.items())
    copy = None
    try:
        if path.exists():
            copies = (path.with_name(f"{path.name}.before-{number}") for number in range(1, 1000))
            copy = next(free for free in copies if not free.exists())
            os.link(path, copy)
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(text, encoding="utf-8")
        fresh.chmod(0o600)
        os.replace(fresh, path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    return copy


def environment_files() -> list[Path]:
    """Return the files that DeepSpeed reads: in the home, then in the working directory, which wins.

    DS_ENV_FILE is another name for both; an absolute path there is one file, and so is a home that is the working
    directory.
    """
    name = os.environ.get("DS_ENV_FILE", ENVIRONMENT_FILE)
    files: list[Path] = []
    for folder in (os.path.expanduser("~"), "."):
        path = Path(os.path.join(folder, name))
        if path.is_file() and not any(path.samefile(other) for other in files):
            files.append(path)
    return files


def environment_of_ranks() -> dict[str, str]:
    """Return what `finetune launch` sets for ranks on every host: exported variables of this process, then of files."""
    files = environment_files()
    named = os.environ.get("DS_ENV_FILE")
    if named and not files:
        raise ConfigError(f"DS_ENV_FILE={named}: there is no such file in {Path.cwd()} or {os.path.expanduser('~')}")
    values = {name: value for name, value in os.environ.items() if is_exported(name)}
    for path in files:
        values |= read_environment_file(path)
    return values


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()}): it would set variables on every "
            "host; write a file of your own, or chown it"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path} can be written by others (mode {mode:o}): chmod go-w {path}")


def _parse_line(raw: bytes) -> dict[str, str]:
    """{name: value} of a line, {} for a comment or an empty line. Raises ValueError that shows no value."""
    line = decode_line(raw)
    if line is None:
        return {}
    key, equals, value = line.partition("=")
    key = _EXPORT.sub("", key, count=1) if _EXPORT.match(key) else key
    if not equals:
        raise ValueError(f'no "=" after {_abridge(key, SHOWN_OF_LINE)}: write NAME=value, or # for a comment')
    if not _NAME.fullmatch(key):
        if _NAME.fullmatch(key.strip()):
            raise ValueError(f'a space before "=": write {key.strip()}=value')
        raise ValueError(
            f"{_abridge(key, SHOWN_OF_NAME)} is not a name: expected letters, digits and _, not a digit first"
        )
    if "\0" in value:
        raise ValueError(f"{key} has a NUL character in its value: no variable can hold one")
    if value.startswith((" ", "\t")):
        raise ValueError(f'a space after "=": write {key}=value, with quotes where the value begins with a space')
    is_quoted = len(value) >= 2 and value[0] in "\"'" and value.find(value[0], 1) == len(value) - 1
    return {key: value[1:-1] if is_quoted else value}  # `"a b"` -> `a b`; `"a" "b"` and `"a` stay as they are


def _abridge(text: str, characters: int) -> str:
    return repr(text if len(text) <= characters else text[:characters] + "...")
