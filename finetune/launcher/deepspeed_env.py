"""`.deepspeed_env`: variables that the ranks of every host get.

    # comment
    NCCL_SOCKET_IFNAME=eth0
    export HF_HOME="/shared/hub cache"

The launcher splits each line at its first `=` and pastes both halves into a remote shell command (`add_export` in
deepspeed/launcher/multinode_runner.py, 0.19.8). Here a line is a name and characters: nothing in it is ever executed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from finetune.launcher.env_variables import is_exported
from finetune.launcher.text_file import read_small_file, text_of
from finetune.utils.errors import ConfigError, StorageError, format_faults

FILE_NAME = ".deepspeed_env"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPORT = re.compile(r"export[ \t]+")
# What stands in front of a missing or misplaced "=" may be a password.
SHOWN_OF_A_KEY, SHOWN_OF_A_LINE = 8, 4


def read_environment_file(path: str | PathLike[str]) -> dict[str, str]:
    """Name -> value, in the order of the file; of a name set twice the last counts.

    A value wholly in matching quotes loses them, spaces behind it are left out; all else is kept as it stands.

    Raises:
        ConfigError: no such file; one that others can write or that belongs to somebody else; or bad lines, all of
            them in one message, in which no value is shown.
    """
    path = Path(path)
    lines, status = read_small_file(path, "environment file")
    _check_owner(path, status)
    found, faults = {}, []
    for number, raw in lines:
        try:
            pair = _pair(raw)
        except ValueError as error:
            faults.append(f"{path}, line {number}: {error}")
        else:
            found.update([pair] if pair else [])
    if faults:
        raise ConfigError(format_faults(faults, "bad environment line"))
    return found


def write_environment_file(path: Path, values: Mapping[str, str]) -> Path | None:
    """Write lines that the launcher reads, too: no comment, no blank line. What was there is kept beside it.

    Returns:
        Where the file went that was there, None where there was none.

    Raises:
        StorageError: the disk refused.
    """
    text = "".join(f"{name}={value}\n" for name, value in values.items())
    aside = None
    try:
        if path.exists():
            aside = next(
                one for number in range(1, 1000) if not (one := path.with_name(f"{path.name}.before-{number}")).exists()
            )
            os.link(path, aside)
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(text, encoding="utf-8")
        fresh.chmod(0o600)
        os.replace(fresh, path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    return aside


def environment_files() -> list[Path]:
    """Those that DeepSpeed would read: in the home, then in the working directory, which wins.

    DS_ENV_FILE is another name for both; a whole path there is one file, and so is a home that is worked in.
    """
    name = os.environ.get("DS_ENV_FILE", FILE_NAME)
    found: list[Path] = []
    for folder in (os.path.expanduser("~"), "."):
        path = Path(os.path.join(folder, name))
        if path.is_file() and not any(path.samefile(other) for other in found):
            found.append(path)
    return found


def travelling_environment() -> dict[str, str]:
    """What `environment_files` set, merged; the working directory wins.

    Raises:
        ConfigError: as `read_environment_file`; or DS_ENV_FILE names no file, which the launcher passes over.
    """
    files = environment_files()
    named = os.environ.get("DS_ENV_FILE")
    if named and not files:
        raise ConfigError(f"DS_ENV_FILE={named}: there is no such file in {Path.cwd()} or {os.path.expanduser('~')}")
    return {name: value for path in files for name, value in read_environment_file(path).items()}


def environment_of_ranks() -> dict[str, str]:
    """What `finetune launch` gives to ranks on every host: variables of this process that travel, then the files'.

    Raises:
        ConfigError: as `travelling_environment`.
    """
    return {**{name: value for name, value in os.environ.items() if is_exported(name)}, **travelling_environment()}


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()}): it would set variables on every "
            "host; write a file of your own, or chown it"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{path} can be written by others (mode {mode:o}): chmod go-w {path}")


def _pair(raw: bytes) -> tuple[str, str] | None:
    """(name, value) of a line, None for a comment or an empty line. Raises ValueError that shows no value."""
    line = text_of(raw)
    if line is None:
        return None
    key, equals, value = line.partition("=")
    key = _EXPORT.sub("", key, count=1) if _EXPORT.match(key) else key
    if not equals:
        raise ValueError(f'no "=" behind {_shortened(key, SHOWN_OF_A_LINE)}: write NAME=value, or # for a comment')
    if not _NAME.fullmatch(key):
        if _NAME.fullmatch(key.strip()):
            raise ValueError(f'a space in front of "=": write {key.strip()}=value')
        raise ValueError(
            f"{_shortened(key, SHOWN_OF_A_KEY)} is not a name: expected letters, digits and _, no digit in front"
        )
    if "\0" in value:
        raise ValueError(f"{key} has a NUL character in its value: no variable can hold one")
    if value.startswith((" ", "\t")):
        raise ValueError(f'a space behind "=": write {key}=value, with quotes where the value begins with a space')
    return key, _unquoted(value)


def _unquoted(value: str) -> str:
    r"""`"a b"` -> `a b`; `"a" "b"` and `"a` stay as they are."""
    if len(value) >= 2 and value[0] in "\"'" and value.find(value[0], 1) == len(value) - 1:
        return value[1:-1]
    return value


def _shortened(text: str, characters: int) -> str:
    return repr(text if len(text) <= characters else text[:characters] + "...")
