"""The hosts and slots of a run: the hostfile after --include, --exclude, --num_nodes and --num_gpus.

    # comment
    node0 slots=8
    user@node1 slots=8  # comment
    node2 slots=8 spare  # `finetune train --max_restarts` starts there in place of a host that fails

The grammar is that of `_parse_hostfile` in deepspeed/launcher/runner.py (0.19.8), without what it reads only in part:
it ignores anything after the first digits (`slots=2.5` is 2) and takes any word for a host. The flags mean what
`parse_resource_filter` and `apply_num_nodes_and_gpus` there make of them; tests hold them equal. Those functions are
not called: to import them takes three seconds and loads torch before a wrong flag is named, and they silently use
fewer or more slots than were asked for.
"""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from finetune.launcher.deepspeed_args import LauncherArgs, parse_launcher_args
from finetune.utils.errors import ConfigError, did_you_mean, format_names, near_paths, raise_faults, shorten

MAX_SLOTS = 1024  # more than any host has; it catches typing errors
MAX_BYTES = 1 << 20  # four times a hostfile of 10,000 hosts
SHOWN_CHARACTERS = 80
_ENTRY = re.compile(r"(\S+)[ \t]+slots=([0-9]{1,9})(?:[ \t]+(spare))?")
_COMMENT = re.compile(r"[ \t]+#.*$", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*")
_NUMBERS = re.compile(r"[0-9.]+")
EXPECTED = f"expected HOST slots=N (1 to {MAX_SLOTS}, one per GPU or CPU rank), then at most `spare` and a # comment"
JOB_HOSTFILE = Path("/job/hostfile")
THIS_MACHINE = "localhost"


def _read_hostfile(path: Path) -> dict[str, tuple[int, bool]]:
    """Host -> (slots, whether it is a spare), in the order of the ranks; one error names all bad lines."""
    lines, _ = read_small_file(path, "hostfile", ' (--hostfile="" is this machine alone)')
    entries: dict[str, tuple[int, bool]] = {}
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
            line = raw.decode("utf-8", errors="backslashreplace").strip(" \t")
            faults.append(f"{path}, line {number}: {shorten(line, SHOWN_CHARACTERS)!r}: {error}")
        else:
            first_lines[identity] = number
            entries[entry[0]] = entry[1:]
    raise_faults(faults, noun="bad hostfile line")
    if not entries:
        raise ConfigError(f'hostfile {path} names no host: write lines "HOST slots=N", or --hostfile="" to stay here')
    return entries


def _parse_line(raw: bytes) -> tuple[str, int, bool] | None:
    """(host, slots, whether it is a spare) of a line; None for a comment or an empty line.

    Raises ValueError with the fault and its remedy.
    """
    line = decode_line(raw)
    if line is None:
        return None
    entry = _COMMENT.sub("", line)
    match = _ENTRY.fullmatch(entry)
    if match is None or not 1 <= int(match[2]) <= MAX_SLOTS:
        raise ValueError(EXPECTED)
    host = match[1]
    if fault := _name_fault(host):
        raise ValueError(fault)
    return host, int(match[2]), match[3] is not None


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
        remedy = "write a name for it; a port stands in ~/.ssh/config"
        return "" if _is_address(name) and not at else f"not an IPv6 address that pdsh takes: {remedy}"
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


def read_small_file(path: Path, noun: str, hint: str = "") -> tuple[list[tuple[int, bytes]], os.stat_result]:
    """Return (line number from 1, bytes without the line end) of every line, and the stat of the open file.

    LF, CRLF and CR end a line; a UTF-8 byte order mark is skipped. `noun` and `hint` are for errors.
    """
    try:
        # Not blocking: opening a pipe would wait for its writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status, content = os.fstat(file.fileno()), file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(_describe_missing(path, noun) + hint) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{noun} {path} cannot be read: {reason.lower()}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{noun} {path} is a pipe or a device: expected a file")
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
    return f"{noun} {path}: there is no such file in {folder}{near_paths(path)}"


@dataclass(frozen=True)
class Resources:
    """What a run uses, read from its hostfile once."""

    path: str  # of the hostfile
    pool: dict[str, int]  # host -> slots, all lines of the hostfile
    slots: dict[str, list[int]]  # host -> the slot numbers that the run uses, in the order of the ranks
    spares: dict[str, int] = field(default_factory=dict)  # host -> slots: those of `slots` that are marked as spares

    @property
    def first_host(self) -> str:
        """The host of rank 0, where the rendezvous is."""
        return next(iter(self.slots))

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return sum(map(len, self.slots.values()))

    def hostfile_text(self) -> str:
        """The hostfile as the launcher of any host can read it."""
        return "".join(f"{host} slots={count}\n" for host, count in self.pool.items())


def resolve_resources(flags: LauncherArgs) -> Resources | None:
    """Read the hostfile and apply the filters; None for this machine alone.

    An empty --hostfile, or none if there is no /job/hostfile, means this machine alone. Its number of slots is not
    known here, so that of its filters only the named hosts are checked.
    """
    _check_combination(flags)
    path = flags.hostfile
    if path is None and JOB_HOSTFILE.is_file():
        path = str(JOB_HOSTFILE)
    if not path:
        _check_this_machine(flags)
        return None
    entries = _read_hostfile(Path(path))
    pool = {host: count for host, (count, _) in entries.items()}
    if flags.include:
        named = _named_slots("include", flags.include, pool, path)
        slots = {host: named[host] for host in pool if host in named}
    elif flags.exclude:
        named = _named_slots("exclude", flags.exclude, pool, path)
        left = {
            host: [slot for slot in range(count) if slot not in named.get(host, ())] for host, count in pool.items()
        }
        slots = {host: ids for host, ids in left.items() if ids}
        if not slots:
            raise ConfigError(f"--exclude {flags.exclude} leaves no slot of {path}: name fewer")
    else:
        slots = _first_slots(flags, pool, path)
    _check_node_rank(flags, len(slots))
    return Resources(path, pool, slots, {host: len(slots[host]) for host in slots if entries[host][1]})


def resources_of_command(words: Sequence[str]) -> Resources | None:
    """What `deepspeed WORDS` was told to use; None for this machine alone, and for the autotuner, which decides."""
    flags = parse_launcher_args(words)
    return None if flags.autotuning else resolve_resources(flags)


def local_slots(flags: LauncherArgs, gpus: int) -> list[int]:
    """The slots of this machine without a hostfile: those of --include or --num_gpus, else its GPUs, or one.

    Without such flags the launcher takes the numbers in CUDA_VISIBLE_DEVICES; with them it ignores the variable.
    """
    count = flags.num_gpus if flags.num_gpus > 0 else max(gpus, 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace("-1", "") if gpus else ""
    if not re.fullmatch(r"([0-9]{1,4}(,[0-9]{1,4})*)?", visible):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES={visible}: the launcher takes numbers only (`nvidia-smi -L`)")
    numbers = [int(word) for word in visible.split(",") if word]
    if flags.include:
        slots = _parse_filter("include", flags.include).get(THIS_MACHINE) or list(range(count))
    elif flags.exclude:
        excluded = _parse_filter("exclude", flags.exclude).get(THIS_MACHINE)  # none is named: the whole host
        slots = [slot for slot in range(count) if excluded and slot not in excluded]
        if not slots:
            raise ConfigError(f"--exclude {flags.exclude}: no slot of this machine is left: name fewer of its {count}")
    elif flags.num_gpus <= 0 and numbers:
        return numbers
    else:
        slots = list(range(count))
    if hidden := [slot for slot in slots if numbers and slot not in numbers]:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible}: the launcher ignores it beside --num_gpus, --include or --exclude, and "
            f"would take GPU {hidden[0]}: leave that flag out, or unset the variable"
        )
    return slots


def _check_combination(flags: LauncherArgs) -> None:
    if flags.include and flags.exclude:
        raise ConfigError("--include and --exclude exclude each other: keep one of them")
    for name, value in (("num_nodes", flags.num_nodes), ("num_gpus", flags.num_gpus)):
        if value == -1:
            continue  # the launcher's own value for "all"
        if value < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1, or leave it out for all")
        for other in ("include", "exclude"):
            if getattr(flags, other):
                raise ConfigError(f"--{name} and --{other} exclude each other: name the slots in --{other}")


def _check_this_machine(flags: LauncherArgs) -> None:
    if flags.num_nodes > 1:
        raise ConfigError(f"--num_nodes {flags.num_nodes} without a hostfile: give --hostfile, or leave it out")
    for name, text in (("include", flags.include), ("exclude", flags.exclude)):
        for host in _parse_filter(name, text) if text else ():
            if host != THIS_MACHINE:
                raise ConfigError(f"--{name} {text}: without a hostfile there is {THIS_MACHINE} only, not {host!r}")
    _check_node_rank(flags, 1)


def _check_node_rank(flags: LauncherArgs, hosts: int) -> None:
    if flags.no_ssh and not 0 <= flags.node_rank < hosts:
        given = f"--node_rank {flags.node_rank}" if "node_rank" in flags.given else "no --node_rank"
        raise ConfigError(f"--no_ssh with {given}: expected this host's number, 0 to {hosts - 1}")


def _first_slots(flags: LauncherArgs, pool: Mapping[str, int], path: str) -> dict[str, list[int]]:
    """The first --num_nodes hosts, of each the first --num_gpus slots."""
    if flags.num_nodes > len(pool):
        raise ConfigError(f"--num_nodes {flags.num_nodes}: {path} names {len(pool)} hosts")
    hosts = list(pool)[: flags.num_nodes] if flags.num_nodes > 0 else list(pool)
    short = [f"{host} has {pool[host]}" for host in hosts if pool[host] < flags.num_gpus]
    if short:
        raise ConfigError(f"--num_gpus {flags.num_gpus} is more than the slots in {path}: {', '.join(short)}")
    return {host: list(range(flags.num_gpus if flags.num_gpus > 0 else pool[host])) for host in hosts}


def _named_slots(name: str, text: str, pool: Mapping[str, int], path: str) -> dict[str, list[int]]:
    """Host -> the slots that a filter names, all of them for a whole host; checked against the hostfile."""
    named = _parse_filter(name, text)
    for host, numbers in named.items():
        if host not in pool:
            hint = did_you_mean(host, pool, f"it has {format_names(list(pool))}")
            if any(character in "".join(pool) for character in "@:"):
                hint += " (a host written with @ or : cannot be named here, give it a plain name)"
            raise ConfigError(f"--{name} {text}: no host {host!r} in {path}: {hint}")
        if numbers and numbers[-1] >= pool[host]:
            first = next(number for number in numbers if number >= pool[host])
            raise ConfigError(f"--{name} {text}: {host} has no slot {first}: its slots are 0 to {pool[host] - 1}")
    return {host: numbers or list(range(pool[host])) for host, numbers in named.items()}


def _parse_filter(name: str, text: str) -> dict[str, list[int]]:
    """`a@b:2,0` -> {"a": [], "b": [0, 2]}; a host named twice has the slots of both."""
    slots: dict[str, list[int]] = {}
    whole_hosts = set()
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        words = [number.strip(" ") for number in numbers.split(",")] if colon else []
        if not host or not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
            raise ConfigError(f"--{name} {text}: {part!r}: expected HOST or HOST:SLOT,SLOT..., joined by @")
        if not colon:
            whole_hosts.add(host)
        slots[host] = sorted({*slots.get(host, ()), *map(int, words)})
    for host in sorted(whole_hosts):
        if slots[host]:  # the launcher would use the slots and ignore that the whole host was named
            raise ConfigError(f"--{name} {text}: {host} is named whole and by slots: keep one of them")
    return slots
