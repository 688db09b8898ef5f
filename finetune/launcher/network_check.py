"""Check that the ranks of several hosts reach each other: the way to the rendezvous, then an all-reduce of all.

    host 0   reduce_on_host ── rank 0, rank 1, ...      starts this host's ranks and collects their measurements
    host 1   reduce_on_host ── rank 8, rank 9, ...      ranks use the backend and the variables of the run

The measure is that of nccl-tests, the bus bandwidth (its PERFORMANCE.md): with n ranks each byte crosses the wire
2 (n - 1) / n times.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from finetune.distributed import host_probe
from finetune.launcher.ssh import SshShell, add_interface, in_brackets, run_on_all_hosts, run_program_on_hosts
from finetune.utils.errors import lines_of
from finetune.utils.proc import command_calling

SECONDS_TO_CONNECT = 10
SECONDS_TO_REDUCE = 60
BYTES = 16 << 20
REPEATS = 4
RESULT_PREFIX = "finetune measured "


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


def all_reduce(
    slots: Mapping[str, Sequence[int]],
    shell: SshShell,
    *,
    address: str,
    port: int,
    backend: str,
    environment: Mapping[str, str],
    interfaces: Mapping[str, str],
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Start all ranks on all hosts, as `finetune launch` does, and all-reduce a few megabytes.

    Returns what each rank measured, in bus bandwidth (bytes per second), and (host, fault).
    """
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
    command = command_calling(reduce_on_host)
    ranks: list[dict[str, Any]] = []
    faults = []
    for host, answer in run_program_on_hosts(orders, shell, command, SECONDS_TO_REDUCE + 20).items():
        if isinstance(answer, str):
            faults.append((host, answer))
            continue
        ranks += answer
        errors = [rank["error"] for rank in answer if "error" in rank]
        if errors:
            faults.append((host, f"all-reduce among the {world_size} ranks fails: {errors[0]}"))
    return ranks, faults


def reduce_on_host() -> None:
    """Read an order as JSON from stdin, start this host's ranks, print their measurements as one line of JSON."""
    order = json.loads(sys.stdin.read())
    environment = {**os.environ, **order["environment"]}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if order["devices"]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, order["devices"]))
    deadline = time.monotonic() + order["seconds"]

    def run(local_rank: int) -> dict[str, Any]:
        rank = order["first_rank"] + local_rank
        return _run_rank({**order, "rank": rank, "local_rank": local_rank}, environment, deadline)

    with ThreadPoolExecutor(order["ranks"]) as pool:  # all are read at once: NCCL_DEBUG=INFO fills a pipe
        print(json.dumps(list(pool.map(run, range(order["ranks"])))))


def _run_rank(order: dict[str, Any], environment: dict[str, str], deadline: float) -> dict[str, Any]:
    """What a rank measured, or its `error`."""
    try:
        done = subprocess.run(
            command_calling(measure), input=json.dumps(order), capture_output=True, text=True, env=environment,
            timeout=max(deadline - time.monotonic(), 0.1),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"rank": order["rank"], "error": "the ranks did not find each other in time"}
    results = [line for line in done.stdout.splitlines() if line.startswith(RESULT_PREFIX)]  # NCCL prints there, too
    if done.returncode or not results:
        return {"rank": order["rank"], "error": lines_of(done.stderr)[-1]}
    return json.loads(results[-1].removeprefix(RESULT_PREFIX))


def measure() -> None:
    """Be one rank: join the process group, reduce a few times, print the time it took."""
    order = json.loads(sys.stdin.read())
    import torch
    import torch.distributed as dist

    on_gpu = order["backend"] == "nccl"
    device = torch.device("cuda", order["local_rank"]) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        order["backend"],
        init_method=f"tcp://{order['address']}:{order['port']}",
        rank=order["rank"],
        world_size=order["world_size"],
        timeout=timedelta(seconds=order["seconds"]),
    )
    values = torch.full((BYTES // 4,), float(order["rank"]), device=device)
    dist.all_reduce(values)  # the first one opens connections
    expected = order["world_size"] * (order["world_size"] - 1) / 2
    if not bool((values == expected).all()):
        raise ArithmeticError(f"the sum over the ranks is {values[0].item()}, not {expected}")
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / REPEATS
    factor = 2 * (order["world_size"] - 1) / order["world_size"]
    result = {"rank": order["rank"], "seconds": seconds, "bytes_per_second": BYTES / seconds * factor}
    print(RESULT_PREFIX + json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()
