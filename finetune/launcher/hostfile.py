"""The hostfile: one line per host, its name and how many ranks it runs.

    # comment
    node0 slots=8
    user@node1 slots=8  # comment

The grammar is that of `_parse_hostfile` in deepspeed/launcher/runner.py (0.19.8), less what it reads only by half:
it takes anything behind the first digit (`slots=2.5` is 2) and anything without a space for a host.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from os import PathLike
from pathlib import Path

from finetune.launcher.text_file import read_small_file, text_of
from finetune.utils.errors import ConfigError, format_faults

# Ranks on CPUs go beyond any number of GPUs in a host; the bound is there for typing errors.
MAX_SLOTS = 1024
SHOWN_CHARACTERS = 80
_ENTRY = re.compile(r"(\S+)[ \t]+slots=([0-9]{1,9})")
_COMMENT = re.compile(r"[ \t]+#.*$", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*")
_NUMBERS = re.compile(r"[0-9.]+")


def read_hostfile(path: str | PathLike[str]) -> dict[str, int]:
    """Host -> slots, in the order of the file, which is the order of the ranks.

    Raises:
        ConfigError: no such file, not a text file, no host in it; or bad lines, all of them in one message.
    """
    path = Path(path)
    lines, _ = read_small_file(path, "hostfile", ' (--hostfile="" is this machine alone)')
    found: dict[str, int] = {}
    first_lines: dict[str, int] = {}
    faults = []
    for number, raw in lines:
        try:
            entry = _entry(raw)
            if entry is None:
                continue
            host, slots = entry
            same = _identity(host)
            if same in first_lines:
                raise ValueError(f"the host of line {first_lines[same]} again: write one line with all its slots")
        except ValueError as error:
            faults.append(f"{path}, line {number}: {_shown(raw)}: {error}")
        else:
            first_lines[same] = number
            found[host] = slots
    if faults:
        raise ConfigError(format_faults(faults, "bad hostfile line"))
    if not found:
        raise ConfigError(f'hostfile {path} names no host: write lines "HOST slots=N", or --hostfile="" to stay here')
    return found


def _entry(raw: bytes) -> tuple[str, int] | None:
    """(host, slots) of a line, None for a comment or an empty line. Raises ValueError with what is wrong."""
    line = text_of(raw)
    if line is None:
        return None
    entry = _COMMENT.sub("", line)
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError(_misshapen(entry))
    host, slots = match[1], int(match[2])
    fault = _bad_host(host)
    if fault:
        raise ValueError(fault)
    if not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"slots={match[2]}: expected 1 to {MAX_SLOTS}, one per GPU or CPU rank of the host")
    return host, slots


def _misshapen(entry: str) -> str:
    """What is wrong with a line that is not `HOST slots=N`, and how to write it."""
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
        return f"{' '.join(rest[1:])!r} behind the slots: only a comment with # may stand there"
    return f"separate host and slots by spaces or tabs: write {host} slots=N"


def _bad_host(host: str) -> str:
    """What is wrong with the name of a host; empty where nothing is.

    pdsh -w splits at commas, expands brackets and takes a leading - or ^ for an order; ssh takes a leading - for an
    option. `user@host` means the same to both, but pdsh does not take it with an IPv6 address.
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
    """Names are compared as the resolver does: whatever their case, a final dot, the form of an address, the user."""
    name = host.rpartition("@")[2].lower()
    return str(ip_address(name)) if _is_address(name) else name.rstrip(".")


def _shown(raw: bytes) -> str:
    line = raw.decode("utf-8", errors="backslashreplace").strip(" \t")
    return repr(line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "...")
