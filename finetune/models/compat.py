"""Patches of bitsandbytes, written for 0.50."""

from __future__ import annotations


def keep_packing() -> None:
    """Keep 4-bit weights as they were packed for training, also where a model is evaluated on a CPU with AVX512-BF16.

    There a forward pass without gradients would repack them for good: frozen weights would change, later steps fail,
    results be those of bfloat16, and layers of fewer than 64 inputs could not run at all.
    """
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False
