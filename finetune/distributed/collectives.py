"""Collective operations of a run's processes: gather objects, run on one or all ranks, find shared storage."""

import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from finetune.distributed.compat import check_shared_memory, remove_shared_buffer
from finetune.utils.errors import FinetuneError, storage_errors


def _dist() -> Any:
    """torch.distributed, which takes two seconds to import."""
    import torch.distributed

    return torch.distributed


def _is_initialized() -> bool:
    return "torch" in sys.modules and _dist().is_initialized()


def init_process_group(backend: str, *, uses_deepspeed: bool, timeout: int) -> None:
    """Join the run's process group; `timeout` is how many seconds a rank waits for the others.

    DeepSpeed's process group comes first: if `TrainingArguments` is built before it on a CPU, torch's group alone is
    started, and ZeRO-3 then partitions the model for a world size of 1.
    """
    dist = _dist()
    if dist.is_initialized() or (not uses_deepspeed and int(os.environ.get("WORLD_SIZE", "1")) == 1):
        return
    if backend == "nccl":
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if uses_deepspeed:
        import deepspeed

        if backend == "gloo":
            check_shared_memory()
        deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout), verbose=False)
        if backend == "gloo":
            all_gather_object(None)
            remove_shared_buffer()
    else:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def destroy_process_group() -> None:
    """Leave the process group on all ranks at once: a rank that ends while others still talk to it can abort them.

    DeepSpeed keeps groups that it has derived: unless it leaves by itself, a second run of this process would use them.
    """
    if not _is_initialized():
        return
    all_gather_object(None)
    communication = sys.modules.get("deepspeed.comm")
    if communication is not None and communication.is_initialized():
        communication.destroy_process_group()
    else:
        _dist().destroy_process_group()


def get_rank() -> int:
    """Return this process's rank, 0 outside a process group."""
    return _dist().get_rank() if _is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 outside a process group."""
    return _dist().get_world_size() if _is_initialized() else 1


def all_gather_object(value: Any) -> list[Any]:
    """Return the value of each rank, by rank, on every rank."""
    if not _is_initialized():
        return [value]
    values = [None] * get_world_size()
    _dist().all_gather_object(values, value)
    return values


def all_gather_ints(values: list[int], device: Any) -> list[list[int]]:
    """Return the integers of each rank, [ranks][values], on every rank; `device` is that of the process group."""
    if not _is_initialized():
        return [values]
    import torch

    gathered = torch.zeros(get_world_size(), len(values), dtype=torch.int64, device=device)
    gathered[get_rank()] = torch.tensor(values)
    _dist().all_reduce(gathered)  # one small tensor, where a gather makes one per rank
    return gathered.tolist()


def run_on_rank_0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 while the others wait; every rank returns its result, or raises its FinetuneError."""
    result: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            result = [action(), None]
        except FinetuneError as error:
            result = [None, error]
    if _is_initialized():
        _dist().broadcast_object_list(result, src=0)
    if result[1] is not None:
        result[1].is_shared = True
        raise result[1]
    return result[0]


def run_on_all_ranks(action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and return all results, by rank; if some fail, all raise the error of the lowest."""
    value, failure = None, None
    try:
        value = action()
    except FinetuneError as error:
        failure = error
    outcomes = all_gather_object((value, failure))
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        failures[0].is_shared = True
        raise failures[0]
    return [value for value, _ in outcomes]


def first_not_none(value: str | None) -> str | None:
    """Return, on every rank, the value of the lowest rank that has one; None if none has."""
    return next((gathered for gathered in all_gather_object(value) if gathered is not None), None)


def host_names() -> list[str]:
    """Return the name of each rank's host, by rank."""
    return all_gather_object(os.uname().nodename)


@dataclass(frozen=True)
class StorageGroup:
    """The ranks that see the same files as this rank."""

    writer: int  # the lowest of them, which writes what all of them share
    ranks: tuple[int, ...]
    all_groups: list[list[int]]  # the ranks of each group; one group if all ranks share a file system

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see the same files."""
        return len(self.all_groups) == 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes for its group."""
        return get_rank() == self.writer

    def run_on_writers(self, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on the writer of each group, as `run_on_all_ranks` does; None for the other ranks."""
        return run_on_all_ranks(action if self.is_writer else lambda: None)


def find_storage_group(folder: Path) -> StorageGroup:
    """Find out which ranks share `folder`: the first rank of each host writes a file there, and all look for each."""
    if get_world_size() == 1:
        return StorageGroup(0, (0,), [[0]])
    run_key = all_gather_object(secrets.token_hex(8))[0]
    is_first_of_host = int(os.environ.get("LOCAL_RANK", "0")) == 0
    rank = get_rank()

    def marker(of_rank: int) -> Path:
        return folder / f".seen-{run_key}-{of_rank}"

    def write_marker() -> int | None:
        if not is_first_of_host:
            return None
        with storage_errors(folder, f"{folder} on {os.uname().nodename}"):
            folder.mkdir(parents=True, exist_ok=True)
            marker(rank).write_text(run_key, encoding="utf-8")
        return rank

    first_ranks = [first for first in run_on_all_ranks(write_marker) if first is not None]
    visible = [first for first in first_ranks if os.path.exists(marker(first))]  # the key makes their names unique
    writers = all_gather_object(min(visible, default=rank))
    if is_first_of_host:
        with suppress(OSError):  # a leftover is harmless: the next run has another key
            marker(rank).unlink()
    all_gather_object(None)  # a barrier: no rank continues before the markers are gone
    groups = [[other for other, writer in enumerate(writers) if writer == first] for first in sorted(set(writers))]
    return StorageGroup(writers[rank], tuple(next(ranks for ranks in groups if rank in ranks)), groups)
