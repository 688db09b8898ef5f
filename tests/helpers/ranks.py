"""Run the training story on real ranks without paying for imports each time.

Ranks are forked from one server process that has imported torch, transformers, DeepSpeed and peft; each gets the
environment a launcher would give it and runs `finetune.train.main`. Only the start differs from the `deepspeed`
command, which has tests of its own.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finetune.distributed.compat import patch_build_lock
from finetune.distributed.host_probe import free_port
from finetune.distributed.process_setup import prepare_environment

LIMIT_SECONDS = 300
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.helpers.preload"])


@dataclass(frozen=True)
class Outcome:
    """Exit statuses by rank, and each rank's stdout and stderr together."""

    statuses: list[int]
    outputs: list[str]

    @property
    def succeeded(self) -> bool:
        return all(status == 0 for status in self.statuses)


def train(folder: Path, argv: Sequence[str], world_size: int = 2, encoding: str = "utf-8") -> Outcome:
    """Run the training story with these arguments on `world_size` ranks; it writes no report unless they say so.

    `encoding` is that of stdout and stderr.
    """
    return run(folder, _train, (["--write_report", "False", *map(str, argv)], encoding), world_size)


def run(
    folder: Path, function: Callable[..., Any], arguments: tuple, world_size: int = 2, **environment: str
) -> Outcome:
    """Run `function(*arguments)` on every rank, with these variables; output goes to `folder`/rank-N.log."""
    compile_operator()
    folder.mkdir(parents=True, exist_ok=True)
    environment["MASTER_PORT"] = str(free_port())
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    ranks = [
        FORKSERVER.Process(target=_rank, args=(rank, world_size, environment, str(logs[rank]), function, arguments))
        for rank in range(world_size)
    ]
    for one in ranks:
        one.start()
    _end_together(ranks)
    return Outcome([one.exitcode for one in ranks], [log.read_text(errors="replace") for log in logs])


@cache
def compile_operator() -> None:
    """Compile the operator that every run on a CPU needs, however long that takes: a run has a limit."""
    compiler = FORKSERVER.Process(target=_compile)
    compiler.start()
    compiler.join()
    assert compiler.exitcode == 0, "DeepSpeed's communication operator was not built"


def _compile() -> None:
    prepare_environment()
    patch_build_lock()
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


def _end_together(ranks: list) -> None:
    """Wait; as the launcher does, end the others soon after the first rank that fails."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(one.is_alive() for one in ranks) and time.monotonic() < deadline:
        if any(one.exitcode for one in ranks):
            deadline = min(deadline, time.monotonic() + 1)
        time.sleep(0.05)
    for one in ranks:
        if one.is_alive():
            one.terminate()
        one.join(10)


def _rank(
    rank: int, world_size: int, environment: dict, log: str, function: Callable[..., Any], arguments: tuple
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", **environment,
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # Linux' default, where a rank has its own interpreter
    function(*arguments)


def _train(argv: list[str], encoding: str) -> None:
    from finetune.train import main

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding)
    main(argv)
