"""A small all-reduce among all ranks of a run, before the run: whether they reach each other, and how fast.

    host 0   main ── rank 0, rank 1, ...      main starts this host's ranks and gathers what they say
    host 1   main ── rank 8, rank 9, ...      ranks meet as those of the run will, with its backend and variables

What a rank measures is what nccl-tests calls algorithm and bus bandwidth (its PERFORMANCE.md): with n ranks each byte
crosses the wire 2 (n - 1) / n times.
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
ANSWER = "finetune measured "


def main() -> None:
    """Read an order as JSON from stdin, start this host's ranks, print what they measured as one line of JSON.

    `first_rank`, `ranks` (of this host), `world_size`, `address`, `port`, `backend`, `devices` (a GPU for each rank),
    `environment`, and `seconds` that all may take.
    """
    order = json.loads(sys.stdin.read())
    environment = {**os.environ, **order["environment"]}
    environment.setdefault("OMP_NUM_THREADS", "1")
    if order["devices"]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, order["devices"]))
    processes = []
    for local in range(order["ranks"]):
        own = {"rank": order["first_rank"] + local, "local_rank": local}
        process = subprocess.Popen(
            command_calling(run_rank),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        process.stdin.write(json.dumps({**order, **own}))
        process.stdin.close()
        process.stdin = None
        processes.append((own["rank"], process))
    deadline = time.monotonic() + order["seconds"]
    with ThreadPoolExecutor(len(processes)) as pool:  # all are read at once: NCCL_DEBUG=INFO fills a pipe
        print(json.dumps(list(pool.map(lambda one: _outcome(*one, deadline), processes))))


def _outcome(number: int, process: subprocess.Popen, deadline: float) -> dict[str, Any]:
    try:
        said, complained = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"rank": number, "error": "the ranks did not find each other in time"}
    answers = [line for line in said.splitlines() if line.startswith(ANSWER)]  # NCCL talks there, too
    if process.returncode or not answers:
        reasons = [line for line in complained.splitlines() if line.strip()] or ["it said nothing"]
        return {"rank": number, "error": reasons[-1]}
    return json.loads(answers[-1].removeprefix(ANSWER))


def run_rank() -> None:
    """One rank: meet the others, reduce a few times, print what it took."""
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
    dist.all_reduce(values)  # the first opens connections
    wanted = order["world_size"] * (order["world_size"] - 1) / 2
    if not bool((values == wanted).all()):
        raise ArithmeticError(f"the sum over the ranks is {values[0].item()}, not {wanted}")
    if on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(values)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / REPEATS
    share = 2 * (order["world_size"] - 1) / order["world_size"]
    facts = {"rank": order["rank"], "seconds": seconds, "bytes_per_second": BYTES / seconds * share}
    print(ANSWER + json.dumps({**facts, **_device_facts(torch, device)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _device_facts(torch: Any, device: Any) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "CPU"}
    one = torch.cuda.get_device_properties(device)
    return {
        "device": one.name, "memory": one.total_memory, "capability": [one.major, one.minor],
        "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "bf16": torch.cuda.is_bf16_supported(),
    }  # fmt: skip
