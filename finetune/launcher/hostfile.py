"""The hostfile: one line per host, its name and its number of slots (ranks).

    # comment
    node0 slots=8
    user@node1 slots=8  # comment

The grammar is that of `_parse_hostfile` in deepspeed/launcher/runner.py (0.19.8), without what it reads only in part:
it ignores anything after the first digits (`slots=2.5` is 2) and takes any word for a host.
"""

from __future__ import annotations

import os
import re
import stat
from difflib import get_close_matches
from ipaddress import ip_address
from os import PathLike
from pathlib import Path

from finetune.utils.errors import ConfigError, format_faults

MAX_SLOTS = 1024  # more than any host has; it catches typing errors
MAX_BYTES = 1 << 20  # four times a hostfile of 10,000 hosts
SHOWN_CHARACTERS, SHOWN_NAMES = 80, 3
_ENTRY = re.compile(r"(\S+)[ \t]+slots=([0-9]{1,9})")
_COMMENT = re.compile(r"[ \t]+#.*$", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*")
_NUMBERS = re.compile(r"[0-9.]+")


def read_hostfile(path: str | PathLike[str]) -> dict[str, int]:
    """Return host -> slots, in the order of the file, which is that of the ranks; one error names all bad lines."""
    path = Path(path)
    lines, _ = read_small_file(path, "hostfile", ' (--hostfile="" is this machine alone)')
    slots_by_host: dict[str, int] = {}
    first_lines: dict[str, int] = {}
    faults = []
    for number, raw in lines:
        try:
            entry = _parse_line(raw)
            if entry is None:
                continue
            identity = _identity(entry[0])
            if identity in first_lines:
                raise ValueError(f"the host of line {first_lines[identity]} again: write one line with all its slots")
        except ValueError as error:
            faults.append(f"{path}, line {number}: {_abridge(raw)}: {error}")
        else:
            first_lines[identity] = number
            slots_by_host[entry[0]] = entry[1]
    if faults:
        raise ConfigError(format_faults(faults, "bad hostfile line"))
    if not slots_by_host:
        raise ConfigError(f'hostfile {path} names no host: write lines "HOST slots=N", or --hostfile="" to stay here')
    return slots_by_host


def _parse_line(raw: bytes) -> tuple[str, int] | None:
    """(host, slots) of a line; None for a comment or an empty line. Raises ValueError with the fault and its remedy."""
    line = decode_line(raw)
    if line is None:
        return None
    entry = _COMMENT.sub("", line)
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError(_format_fault(entry))
    host, slots = match[1], int(match[2])
    if fault := _name_fault(host):
        raise ValueError(fault)
    if not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"slots={match[2]}: expected 1 to {MAX_SLOTS}, one per GPU or CPU rank of the host")
    return host, slots


def _format_fault(entry: str) -> str:
    """What is wrong with a line that is not `HOST slots=N`."""
    host, *rest = entry.split()
    if not rest:
        return "no slots: write HOST slots=N, N the number of ranks, one per GPU"
    if "=" in rest[1:2] or rest[0].endswith("=") or (len(rest) > 1 and rest[1].startswith("=")):
        return f'spaces around "=": write {host} slots=N'
    name, equals, value = rest[0].partition("=")
    if name != "slots" or not equals:
        return f"found {rest[0]!r} where slots=N was expected: write {host} slots=N"
    if not re.fullmatch(r"[0-9]{1,9}", value):
        return f"slots={value}: expected a whole number from 1 to {MAX_SLOTS}"
    if len(rest) > 1:
        return f"{' '.join(rest[1:])!r} after the slots: only a comment with # may stand there"
    return f"separate host and slots by spaces or tabs: write {host} slots=N"


def _name_fault(host: str) -> str:
    """What is wrong with the name of a host; "" if nothing is.

    pdsh -w splits at commas, expands brackets and treats a leading - or ^ as an instruction; ssh treats a leading - as
    an option. `user@host` means the same to both, but pdsh does not accept it with an IPv6 address.
    """
    user, at, name = host.rpartition("@")
    if at and not _USER.fullmatch(user):
        return f"user {user!r}: expected letters, digits and . _ -"
    if host.startswith("-"):
        return f"host {host!r} would be read as an option: a name begins with a letter or digit"
    if ":" in name:
        return "" if _is_address(name) and not at else "not an IPv6 address that pdsh takes: write a name for it"
    if not _NAME.fullmatch(name):
        return f"host {host!r}: expected letters, digits and . _ - only, as in node0, 10.0.0.5 or user@node0"
    if _NUMBERS.fullmatch(name) and not _is_address(name):
        return f"host {host!r} is a number, but not an IPv4 address: expected one like 10.0.0.5, or a name"
    return ""


def _is_address(name: str) -> bool:
    try:
        return "%" not in name and bool(ip_address(name))
    except ValueError:
        return False


def _identity(host: str) -> str:
    """A name as the resolver compares it: without case, final dot, user, and with one form for each address."""
    name = host.rpartition("@")[2].lower()
    return str(ip_address(name)) if _is_address(name) else name.rstrip(".")


def _abridge(raw: bytes) -> str:
    line = raw.decode("utf-8", errors="backslashreplace").strip(" \t")
    return repr(line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "...")


def read_small_file(path: Path, noun: str, hint: str = "") -> tuple[list[tuple[int, bytes]], os.stat_result]:
    """Return (line number from 1, bytes without the line end) of every line, and the stat of the open file.

    LF, CRLF and CR end a line; a UTF-8 byte order mark is skipped. `noun` and `hint` are for errors.
    """
    try:
        # Not blocking: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
                raise ConfigError(f"{noun} {path} is {kind}: expected a file")
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(_describe_missing(path, noun) + hint) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{noun} {path} is a folder: expected a file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{noun} {path} cannot be read: {reason.lower()}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{noun} {path} is larger than {MAX_BYTES:,} bytes: is it the right file?")
    lines = re.split(rb"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf"))
    return list(enumerate(lines, start=1)), status


def decode_line(raw: bytes) -> str | None:
    """A line without surrounding blanks; None for a comment or an empty line. Raises ValueError if it is not UTF-8."""
    try:
        line = raw.decode("utf-8").strip(" \t")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text: save the file as plain text") from None
    return None if not line or line.startswith("#") else line


def _describe_missing(path: Path, noun: str) -> str:
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"{noun} {path}: there is no folder {folder}"
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        names = []
    similar = get_close_matches(path.name, names, n=SHOWN_NAMES, cutoff=0.5)
    suggestion = f": did you mean {' or '.join(similar)}?" if similar else ""
    return f"{noun} {path}: there is no such file in {folder}{suggestion}"
