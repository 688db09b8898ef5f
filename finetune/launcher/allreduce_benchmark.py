"""An all-reduce among all ranks of a run, before the run: do they reach each other, and how fast?

    host 0   main ── rank 0, rank 1, ...      main starts this host's ranks and collects their measurements
    host 1   main ── rank 8, rank 9, ...      ranks use the backend and the variables of the run

The measure is that of nccl-tests, the bus bandwidth (its PERFORMANCE.md): with n ranks each byte crosses the wire
2 (n - 1) / n times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from finetune.utils.proc import command_calling

BYTES = 16 << 20
REPEATS = 4
RESULT_PREFIX = "finetune measured "


def main() -> None:
    """Read an order as JSON from stdin, start this host's ranks, print their measurements as one line of JSON.

    The order: `first_rank`, `ranks` (of this host), `world_size`, `address`, `port`, `backend`, `devices` (a GPU for
    each rank), `environment`, and `seconds`, the time limit.
    """
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
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
        return {"rank": order["rank"], "error": lines[-1]}
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
    print(RESULT_PREFIX + json.dumps({**result, **_device_facts(torch, device)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _device_facts(torch: Any, device: Any) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "CPU"}
    gpu = torch.cuda.get_device_properties(device)
    return {
        "device": gpu.name, "memory": gpu.total_memory, "capability": [gpu.major, gpu.minor],
        "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "bf16": torch.cuda.is_bf16_supported(),
    }  # fmt: skip
