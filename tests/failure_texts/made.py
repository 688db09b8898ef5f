"""Failures as tests make them."""

from __future__ import annotations

from finetune.diagnostics import Failure

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 "
    "GiB of "
    "which 1.06 GiB is free. Including non-PyTorch memory, this process has 78.08 GiB memory in use. Of the allocated "
    "memory 75.00 GiB is allocated by PyTorch, and 1.33 GiB is reserved by PyTorch but unallocated."
)
WATCHDOG = (
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=1800000) ran for 1800453 milliseconds before timing out."
)
NCCL = "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2021, "


def said(error: str, kind: str = "exception", **others) -> Failure:
    """A failure that says this."""
    return Failure(kind, error, **others)


def died(number: int, **others) -> Failure:
    """A process that a signal ended."""
    return Failure("died", signal=number, **others)
