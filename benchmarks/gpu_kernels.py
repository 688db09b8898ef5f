"""Kernels on a GPU, measured by themselves: attention over flat rows, and the head with its loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Return the seconds of a call, the best of a few."""
    import torch

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(repeats + 2):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


def attention_rows(device: str) -> list[Sequence[Any]]:
    """Time attention over flat rows, forward and backward: torch's kernel against one conversation at a time."""
    import torch

    from finetune.models.attention import has_kernel, padding_free_attention

    rows: list[Sequence[Any]] = []
    for lengths in ([256] * 64, [2048] * 8, [8192] * 2) if device == "cuda" else ([16] * 4,):
        shapes = [(1, heads, sum(lengths), 128) for heads in (32, 8, 8)]
        parts = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        boundaries = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

        def run(uses_kernel: bool, parts: Any = parts, lengths: Any = lengths, boundaries: Any = boundaries) -> None:
            output, _ = padding_free_attention(
                None, *parts, None, uses_kernel=uses_kernel, segment_lengths=lengths, cu_seq_lens_q=boundaries,
                max_length_q=max(lengths),
            )  # fmt: skip
            output.sum().backward()

        what = f"attention, {len(lengths)} x {lengths[0]}"
        for name, uses_kernel in (("torch's kernel", True), ("loop", False)):
            if uses_kernel and not has_kernel(*parts):
                rows.append((what, name, "not on this device", ""))
                continue
            seconds = seconds_of(lambda uses=uses_kernel: run(uses), device)
            rows.append((what, name, round(1e3 * seconds, 2), ""))
    return rows


def loss_rows(device: str) -> list[Sequence[Any]]:
    """Time head and loss, forward and backward, and the memory that they take beside inputs and weights."""
    from importlib.util import find_spec

    import torch
    import torch.nn.functional as F

    from finetune.models.loss import Head, LossTerms, loss_of_head, loss_of_logits

    rows: list[Sequence[Any]] = []
    for positions, vocabulary in ((8192, 128256), (32768, 151936)) if device == "cuda" else ((32, 1000),):
        hidden = torch.randn(positions, 4096 if device == "cuda" else 64, device=device, dtype=torch.bfloat16)
        module = torch.nn.Linear(hidden.shape[1], vocabulary, bias=False, device=device, dtype=torch.bfloat16)
        head = module.weight
        hidden.requires_grad_()
        targets = torch.randint(vocabulary, (positions,), device=device)

        def in_chunks(x: Any, _: Any, t: Any, module: Any = module, size: int = vocabulary) -> Any:
            terms = LossTerms(t, scale=1 / len(t))
            logits = loss_of_head(Head(module, module.forward, (), size), terms, x)
            return terms.loss + logits.sum()

        ways: dict[str, Callable[[Any, Any, Any], Any]] = {
            "own, in chunks": in_chunks,
            "own, all logits": lambda x, w, t: loss_of_logits(x @ w.T, LossTerms(t, scale=1 / len(t))),
            "stock": lambda x, w, t: F.cross_entropy((x @ w.T).float(), t),
        }
        if device == "cuda" and find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            ways["Liger, fused with the head"] = lambda x, w, t: LigerFusedLinearCrossEntropyLoss()(w, x, t)
        for name, loss in ways.items():

            def run(loss: Any = loss, hidden: Any = hidden, head: Any = head, targets: Any = targets) -> None:
                hidden.grad = head.grad = None
                loss(hidden, head, targets).backward()

            try:
                seconds, peak = seconds_of(run, device, 3), peak_gigabytes(run, device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                seconds, peak = float("nan"), "out of memory"
            rows.append((f"head and loss, {positions} x {vocabulary}", name, round(1e3 * seconds, 2), peak))
    return rows


def peak_gigabytes(call: Callable[[], Any], device: str) -> Any:
    """Return the peak of allocated memory in a call beyond what is allocated after it; empty on a CPU."""
    import torch

    if device == "cpu":
        return ""
    torch.cuda.reset_peak_memory_stats()
    call()
    return round((torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / 1e9, 2)
