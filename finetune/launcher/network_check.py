"""Whether the ranks of several hosts will find each other: the way to where they meet, then an all-reduce of all."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from finetune.distributed import host_probe
from finetune.launcher import allreduce_benchmark
from finetune.launcher.ssh import SshShell, environment_of, in_brackets, run_on_all_hosts, run_on_host
from finetune.utils.proc import command_calling

SECONDS_TO_MEET = 10
SECONDS_TO_REDUCE = 60


@dataclass
class Ways:
    """How hosts reach the first: by host, seconds of a round trip and the interface that leads there; and faults."""

    seconds: dict[str, float] = field(default_factory=dict)
    interfaces: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)


def find_ways(hosts: Sequence[str], shell: SshShell, address: str, port: int) -> Ways:
    """Let every host connect to the first at the address and port where the ranks will meet."""
    first = hosts[0]
    key = secrets.token_hex(8)
    meeting = {"port": port, "key": key, "seconds": SECONDS_TO_MEET, "guests": len(hosts)}
    common = {"address": address, "port": port, "key": key, "seconds": SECONDS_TO_MEET - 2}
    guests = {host: {**common, "name": host} for host in hosts}
    with ThreadPoolExecutor(2) as pool:
        door = pool.submit(run_on_all_hosts, {first: meeting}, shell, host_probe.await_greetings, SECONDS_TO_MEET + 10)
        answers = run_on_all_hosts(guests, shell, host_probe.greet, SECONDS_TO_MEET + 10)
        welcome = door.result()[first]
    ways = Ways()
    if isinstance(welcome, str) or "error" in welcome:
        reason = welcome if isinstance(welcome, str) else welcome["error"]
        ways.faults.append((first, f"port {port}, where the ranks meet: {reason}: give another --master_port"))
        return ways
    for host, answer in answers.items():
        if isinstance(answer, str):
            ways.faults.append((host, answer))
        elif "error" in answer:
            ways.faults.append((host, _unreachable(answer["error"], first, address, port)))
        else:
            ways.seconds[host] = answer["seconds"]
            if answer["interface"]:
                ways.interfaces[host] = answer["interface"]
    return ways


def _unreachable(error: str, first: str, address: str, port: int) -> str:
    return (
        f"does not reach {in_brackets(address)}:{port} on {first}, where the ranks meet ({error}): open the port in "
        "the firewall between them, or give the --master_addr of a network that joins all hosts"
    )


@dataclass
class Reduction:
    """An all-reduce among all ranks: what each measured, in bus bandwidth (bytes a second), and faults by host."""

    ranks: list[dict[str, Any]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def bytes_per_second(self) -> float | None:
        """Of the slowest rank; None where it did not come about."""
        rates = [one["bytes_per_second"] for one in self.ranks if "bytes_per_second" in one]
        return min(rates) if rates and not self.faults else None


def all_reduce(
    slots: Mapping[str, Sequence[int]],
    shell: SshShell,
    *,
    address: str,
    port: int,
    backend: str,
    environment: Mapping[str, str],
    interfaces: Mapping[str, str],
) -> Reduction:
    """Start all ranks of all hosts, as `finetune launch` would, and let them add up a few megabytes."""
    world_size = sum(map(len, slots.values()))
    order = {
        "world_size": world_size, "address": in_brackets(address), "port": port, "backend": backend,
        "seconds": SECONDS_TO_REDUCE,
    }  # fmt: skip
    orders, first_rank = {}, 0
    for host, ids in slots.items():
        devices = list(ids) if backend == "nccl" else []
        own = {"environment": environment_of(environment, interfaces.get(host) if len(slots) > 1 else None)}
        orders[host] = {**order, **own, "first_rank": first_rank, "ranks": len(ids), "devices": devices}
        first_rank += len(ids)
    command = command_calling(allreduce_benchmark.main)

    def one(host: str) -> Any:
        return run_on_host(host, shell, command, json.dumps(orders[host]), SECONDS_TO_REDUCE + 20)

    with ThreadPoolExecutor(len(orders)) as pool:
        answers = dict(zip(orders, pool.map(one, orders), strict=True))
    found = Reduction()
    for host, answer in answers.items():
        if isinstance(answer, str):
            found.faults.append((host, answer))
            continue
        found.ranks += answer
        errors = [one["error"] for one in answer if "error" in one]
        if errors:
            found.faults.append((host, f"all-reduce among the {world_size} ranks fails: {errors[0]}"))
    return found
