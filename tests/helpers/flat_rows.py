"""What tests of flat attention share: lengths of conversations, and what a kernel is told of their boundaries."""

from typing import Any

import torch

LENGTHS = [5, 1, 8, 3]


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def kernel_row(lengths: list[int]) -> dict[str, Any]:
    return {"segment_lengths": lengths, "cu_seq_lens_q": boundaries(lengths), "max_length_q": max(lengths)}
