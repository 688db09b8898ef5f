"""Check that the ranks of several hosts reach each other: the way to the rendezvous, then an all-reduce of all."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from finetune.distributed import host_probe
from finetune.launcher import allreduce_benchmark
from finetune.launcher.ssh import SshShell, add_interface, in_brackets, run_on_all_hosts, run_program_on_hosts
from finetune.utils.proc import command_calling

SECONDS_TO_CONNECT = 10
SECONDS_TO_REDUCE = 60


@dataclass
class RendezvousRoutes:
    """How hosts reach the rendezvous: by host, seconds of a round trip and the interface used; and (host, fault)."""

    seconds: dict[str, float] = field(default_factory=dict)
    interfaces: dict[str, str] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)


def check_rendezvous(hosts: Sequence[str], shell: SshShell, address: str, port: int) -> RendezvousRoutes:
    """Let every host connect to the address and port of the rendezvous, which is on the first host."""
    first = hosts[0]
    key = secrets.token_hex(8)
    listen_order = {"port": port, "key": key, "seconds": SECONDS_TO_CONNECT, "clients": len(hosts)}
    connect_order = {"address": address, "port": port, "key": key, "seconds": SECONDS_TO_CONNECT - 2}
    orders = {host: {**connect_order, "name": host} for host in hosts}
    limit = SECONDS_TO_CONNECT + 10
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(run_on_all_hosts, {first: listen_order}, shell, host_probe.await_connections, limit)
        answers = run_on_all_hosts(orders, shell, host_probe.connect, limit)
        listener = listening.result()[first]
    routes = RendezvousRoutes()
    error = listener if isinstance(listener, str) else listener.get("error")
    if error:
        routes.faults.append((first, f"port {port} of the rendezvous: {error}: give another --master_port"))
        return routes
    for host, answer in answers.items():
        if isinstance(answer, str):
            routes.faults.append((host, answer))
        elif "error" in answer:
            fault = (
                f"does not reach {in_brackets(address)}:{port} on {first}, the rendezvous ({answer['error']}): open "
                "the port in the firewall between them, or give the --master_addr of a network that joins all hosts"
            )
            routes.faults.append((host, fault))
        else:
            routes.seconds[host] = answer["seconds"]
            if answer["interface"]:
                routes.interfaces[host] = answer["interface"]
    return routes


@dataclass
class AllReduceResult:
    """What each rank measured, in bus bandwidth (bytes per second), and (host, fault)."""

    ranks: list[dict[str, Any]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    @property
    def bytes_per_second(self) -> float | None:
        """The rate of the slowest rank; None if the all-reduce failed."""
        rates = [rank["bytes_per_second"] for rank in self.ranks if "bytes_per_second" in rank]
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
) -> AllReduceResult:
    """Start all ranks on all hosts, as `finetune launch` does, and all-reduce a few megabytes."""
    world_size = sum(map(len, slots.values()))
    common = {
        "world_size": world_size, "address": in_brackets(address), "port": port, "backend": backend,
        "seconds": SECONDS_TO_REDUCE,
    }  # fmt: skip
    orders, first_rank = {}, 0
    for host, ids in slots.items():
        variables = add_interface(environment, interfaces.get(host) if len(slots) > 1 else None)
        own = {"first_rank": first_rank, "ranks": len(ids), "devices": list(ids) if backend == "nccl" else []}
        orders[host] = json.dumps({**common, **own, "environment": variables})
        first_rank += len(ids)
    command = command_calling(allreduce_benchmark.main)
    result = AllReduceResult()
    for host, answer in run_program_on_hosts(orders, shell, command, SECONDS_TO_REDUCE + 20).items():
        if isinstance(answer, str):
            result.faults.append((host, answer))
            continue
        result.ranks += answer
        errors = [rank["error"] for rank in answer if "error" in rank]
        if errors:
            result.faults.append((host, f"all-reduce among the {world_size} ranks fails: {errors[0]}"))
    return result
