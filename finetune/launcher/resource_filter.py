"""Which hosts and slots a command asks for.

--include, --exclude, --num_nodes and --num_gpus mean what `parse_resource_filter` and `apply_num_nodes_and_gpus` in
deepspeed/launcher/runner.py (0.19.8) make of them; what those take for less or more than was asked is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from finetune.launcher.deepspeed_args import LauncherArgs
from finetune.launcher.hostfile import read_hostfile
from finetune.utils.errors import ConfigError

JOB_HOSTFILE = Path("/job/hostfile")
THIS_MACHINE = "localhost"


def resolve_resources(flags: LauncherArgs) -> dict[str, list[int]] | None:
    """Host -> slot numbers, in the order of the hostfile; None for this machine alone.

    This machine alone is meant by an empty --hostfile, or by none where there is no /job/hostfile. How many slots it
    has only its hardware says, so that of its filters just the hosts named are checked.

    Raises:
        ConfigError: a hostfile that does not exist or has bad lines; filters that exclude each other, name an unknown
            host or slot, ask for more than there is, or leave nothing.
    """
    _check_together(flags)
    path = flags.hostfile
    if path is None and JOB_HOSTFILE.is_file():
        path = str(JOB_HOSTFILE)
    if not path:
        _check_this_machine(flags)
        return None
    slots = read_hostfile(path)
    if flags.include:
        wanted = _selection("include", flags.include, slots, path)
        kept = {host: wanted[host] or list(range(count)) for host, count in slots.items() if host in wanted}
    elif flags.exclude:
        without = _selection("exclude", flags.exclude, slots, path)
        kept = {host: _remaining(count, without.get(host)) for host, count in slots.items()}
        kept = {host: numbers for host, numbers in kept.items() if numbers}
        if not kept:
            raise ConfigError(f"--exclude {flags.exclude} leaves no slot of {path}: name fewer")
    else:
        kept = _first(flags, slots, path)
    _check_node_rank(flags, len(kept))
    return kept


def local_slots(flags: LauncherArgs, gpus: int) -> list[int]:
    """The slots of this machine where no hostfile is read: of --include or --num_gpus, else its GPUs, or one."""
    count = flags.num_gpus if flags.num_gpus > 0 else max(gpus, 1)
    if flags.include:
        return _parsed("include", flags.include).get(THIS_MACHINE) or list(range(count))
    without = _parsed("exclude", flags.exclude).get(THIS_MACHINE, ()) if flags.exclude else ()
    return [slot for slot in range(count) if slot not in without]


def _check_together(flags: LauncherArgs) -> None:
    if flags.include and flags.exclude:
        raise ConfigError("--include and --exclude exclude each other: keep one of them")
    for name, value in (("num_nodes", flags.num_nodes), ("num_gpus", flags.num_gpus)):
        if value == -1:
            continue  # the launcher's own word for "all"
        if value < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1, or leave it out for all")
        for other in ("include", "exclude"):
            if getattr(flags, other):
                raise ConfigError(f"--{name} and --{other} exclude each other: name the slots in --{other}")


def _check_this_machine(flags: LauncherArgs) -> None:
    if flags.num_nodes > 1:
        raise ConfigError(f"--num_nodes {flags.num_nodes} without a hostfile: give --hostfile, or leave it out")
    for name in ("include", "exclude"):
        text = getattr(flags, name)
        for host in _parsed(name, text) if text else ():
            if host != THIS_MACHINE:
                raise ConfigError(f"--{name} {text}: without a hostfile there is {THIS_MACHINE} only, not {host!r}")
    _check_node_rank(flags, 1)


def _check_node_rank(flags: LauncherArgs, hosts: int) -> None:
    if flags.no_ssh and not 0 <= flags.node_rank < hosts:
        found = f"--node_rank {flags.node_rank}" if "node_rank" in flags.given else "no --node_rank"
        raise ConfigError(f"--no_ssh with {found}: expected this host's number, 0 to {hosts - 1}")


def _first(flags: LauncherArgs, slots: Mapping[str, int], path: str) -> dict[str, list[int]]:
    """The first --num_nodes hosts, of each the first --num_gpus slots."""
    if flags.num_nodes > len(slots):
        raise ConfigError(f"--num_nodes {flags.num_nodes}: {path} names {len(slots)} hosts")
    hosts = list(slots)[: flags.num_nodes] if flags.num_nodes > 0 else list(slots)
    few = [f"{host} has {slots[host]}" for host in hosts if slots[host] < flags.num_gpus]
    if few:
        raise ConfigError(f"--num_gpus {flags.num_gpus} is more than the slots in {path}: {', '.join(few)}")
    return {host: list(range(flags.num_gpus if flags.num_gpus > 0 else slots[host])) for host in hosts}


def _remaining(count: int, without: list[int] | None) -> list[int]:
    """The slots of a host of `count`, without those named; an empty list of names is all of them, None is none."""
    if without is None:
        return list(range(count))
    return [slot for slot in range(count) if without and slot not in without]


def _selection(name: str, text: str, slots: Mapping[str, int], path: str) -> dict[str, list[int]]:
    """Host -> slots named, empty for the whole host; every host and slot is one of the file's."""
    found = _parsed(name, text)
    for host, numbers in found.items():
        if host not in slots:
            close = get_close_matches(host, slots, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(list(slots)[:8])}"
            if any(letter in "".join(slots) for letter in "@:"):
                hint += " (a host written with @ or : cannot be named here, give it a plain name)"
            raise ConfigError(f"--{name} {text}: no host {host!r} in {path}: {hint}")
        beyond = [number for number in numbers if number >= slots[host]]
        if beyond:
            raise ConfigError(f"--{name} {text}: {host} has no slot {beyond[0]}: its slots are 0 to {slots[host] - 1}")
    return found


def _parsed(name: str, text: str) -> dict[str, list[int]]:
    """`a@b:2,0` -> {"a": [], "b": [0, 2]}; a host named twice has the slots of both."""
    found: dict[str, list[int]] = {}
    whole = set()
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        listed = [number.strip(" ") for number in numbers.split(",")] if colon else []
        bad = [number for number in listed if not re.fullmatch(r"[0-9]{1,9}", number)]
        if not host or bad:
            raise ConfigError(f"--{name} {text}: {part!r}: expected HOST or HOST:SLOT,SLOT..., joined by @")
        if not colon:
            whole.add(host)
        found[host] = sorted({*found.get(host, ()), *map(int, listed)})
    both = sorted(host for host in whole if found[host])
    if both:
        # The launcher would take the slots and forget that the whole host was named.
        raise ConfigError(f"--{name} {text}: {both[0]} is named whole and by slots: keep one of them")
    return found
