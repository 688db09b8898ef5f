"""The hosts and slots of a run: the hostfile after --include, --exclude, --num_nodes and --num_gpus.

The flags mean what `parse_resource_filter` and `apply_num_nodes_and_gpus` in deepspeed/launcher/runner.py (0.19.8)
make of them; tests hold the two equal. Those functions are not called: to import them takes three seconds and loads
torch before a wrong flag is named, and they silently use fewer or more slots than were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from finetune.launcher.deepspeed_args import LauncherArgs, parse_launcher_args
from finetune.launcher.hostfile import read_hostfile
from finetune.utils.errors import ConfigError

JOB_HOSTFILE = Path("/job/hostfile")
THIS_MACHINE = "localhost"


@dataclass(frozen=True)
class Resources:
    """What a run uses, read from its hostfile once."""

    path: str  # of the hostfile
    pool: dict[str, int]  # host -> slots, all lines of the hostfile
    slots: dict[str, list[int]]  # host -> the slot numbers that the run uses, in the order of the ranks

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
    pool = read_hostfile(path)
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
    return Resources(path, pool, slots)


def resources_of_command(words: Sequence[str]) -> Resources | None:
    """What `deepspeed WORDS` was told to use; None for this machine alone, and for the autotuner, which decides."""
    flags = parse_launcher_args(words)
    return None if flags.autotuning else resolve_resources(flags)


def local_slots(flags: LauncherArgs, gpus: int) -> list[int]:
    """The slots of this machine without a hostfile: those of --include or --num_gpus, else its GPUs, or one."""
    count = flags.num_gpus if flags.num_gpus > 0 else max(gpus, 1)
    if flags.include:
        return _parse_filter("include", flags.include).get(THIS_MACHINE) or list(range(count))
    excluded = _parse_filter("exclude", flags.exclude).get(THIS_MACHINE, ()) if flags.exclude else ()
    return [slot for slot in range(count) if slot not in excluded]


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
            close = get_close_matches(host, pool, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(list(pool)[:8])}"
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
