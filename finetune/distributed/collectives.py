"""What the processes of a run do together: one of them acts, all of them agree, some of them share a disk."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from finetune.utils.errors import FinetuneError, StorageError


def _dist() -> Any:
    """torch.distributed, which takes two seconds to import."""
    import torch.distributed

    return torch.distributed


def _is_one_of_several() -> bool:
    return "torch" in sys.modules and _dist().is_initialized()


def init_process_group(backend: str, *, uses_deepspeed: bool, timeout: int) -> None:
    """Join this process to the run's; `timeout` is how many seconds a rank waits for the others.

    DeepSpeed's process group comes first: built before it on a CPU, `TrainingArguments` starts torch's group alone,
    and under ZeRO-3 the model is then partitioned for a world of one.
    """
    dist = _dist()
    if dist.is_initialized() or (not uses_deepspeed and int(os.environ.get("WORLD_SIZE", "1")) == 1):
        return
    if backend == "nccl":
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    patience = timedelta(seconds=timeout)
    if uses_deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)
    else:
        dist.init_process_group(backend, timeout=patience)


def destroy_process_group() -> None:
    """The end of a run, on all ranks at once: one that ends while others still talk to it can make them abort."""
    if _is_one_of_several():
        all_gather_object(None)
        _dist().destroy_process_group()


def get_rank() -> int:
    """This process's number, 0 where there is one only."""
    return _dist().get_rank() if _is_one_of_several() else 0


def get_world_size() -> int:
    """How many processes the run has, 1 where it is alone."""
    return _dist().get_world_size() if _is_one_of_several() else 1


def all_gather_object(value: Any) -> list[Any]:
    """What each rank gave, by rank, on every rank."""
    if not _is_one_of_several():
        return [value]
    values = [None] * _dist().get_world_size()
    _dist().all_gather_object(values, value)
    return values


def run_on_rank_0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 while the others wait; what it returns or raises, every rank returns or raises.

    Raises:
        FinetuneError: as `action` did on rank 0.
    """
    result: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            result = [action(), None]
        except FinetuneError as error:
            result = [None, error]
    if _is_one_of_several():
        _dist().broadcast_object_list(result, src=0)
    if result[1] is not None:
        result[1].is_shared = True
        raise result[1]
    return result[0]


def first_not_none(reason: str | None) -> str | None:
    """What the lowest rank that has a reason says, on every rank; None when none has one."""
    return next((one for one in all_gather_object(reason) if one is not None), None)


def run_on_all_ranks(action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and gather what came out; where one raises, all do.

    Raises:
        FinetuneError: as `action` did on the lowest rank on which it failed.
    """
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


@dataclass(frozen=True)
class StorageGroup:
    """Who keeps files in the same place as this rank.

    Attributes:
        writer: the lowest rank that sees this rank's files; it writes for all of them.
        ranks: of this disk.
        all_disks: the ranks of each disk: one disk where all ranks share a file system.
    """

    writer: int
    ranks: tuple[int, ...]
    all_disks: list[list[int]]

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see the same files."""
        return len(self.all_disks) == 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes what the ranks of a disk write once."""
        return get_rank() == self.writer


def find_storage_group(folder: Path) -> StorageGroup:
    """Find out which ranks share `folder`, by a file that the first rank of each host leaves there and all look for.

    Raises:
        StorageError: the folder cannot be written to on some host.
    """
    if not _is_one_of_several() or _dist().get_world_size() == 1:
        return StorageGroup(0, (0,), [[0]])
    run = all_gather_object(secrets.token_hex(8))[0]
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    token = folder / f".seen-{run}-{get_rank()}"

    def leave() -> int | None:
        if not is_first:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            token.write_text(run, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{folder} on {os.uname().nodename}: {error.strerror}") from None
        return get_rank()

    firsts = [rank for rank in run_on_all_ranks(leave) if rank is not None]
    seen = [rank for rank in firsts if _holds(folder / f".seen-{run}-{rank}", run)]
    everyone = all_gather_object(min(seen, default=get_rank()))
    if is_first:
        with suppress(OSError):  # a leftover is harmless: its name is drawn anew each time
            token.unlink()
    all_gather_object(None)  # nobody goes on while a token lies there
    disks = [[rank for rank, one in enumerate(everyone) if one == writer] for writer in sorted(set(everyone))]
    writer = everyone[get_rank()]
    return StorageGroup(writer, next(tuple(ranks) for ranks in disks if get_rank() in ranks), disks)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def host_names() -> list[str]:
    """The name of each rank's host, by rank."""
    return all_gather_object(os.uname().nodename)


def all_gather_ints(values: list[int], device: Any) -> list[list[int]]:
    """[ranks][values]: the integers that each rank gave, on every rank. One small exchange, and the host waits for it.

    Args:
        device: that the processes exchange tensors on.
    """
    if not _is_one_of_several():
        return [values]
    import torch

    mine = torch.tensor(values, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(_dist().get_world_size())]
    _dist().all_gather(everyone, mine)
    return torch.stack(everyone).tolist()
