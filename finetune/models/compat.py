"""Patches of bitsandbytes, written for 0.50."""

from typing import Any


def keep_packing() -> None:
    """Keep 4-bit weights as they were packed for training, also where a model is evaluated on a CPU with AVX512-BF16.

    There a forward pass without gradients would repack them for good: frozen weights would change, later steps fail,
    results be those of bfloat16, and layers of fewer than 64 inputs could not run at all.
    """
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False


def leave_scales_out(model: Any) -> None:
    """Keep the scales of packed weights out of checkpoints, which hold no frozen weights.

    bitsandbytes adds them to the state of a layer, and cannot load those of an 8-bit layer that has run before.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def remove(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in [name for name in state if name.startswith((f"{prefix}weight", f"{prefix}SCB"))]:
            if name != f"{prefix}weight":
                del state[name]

    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            module.register_state_dict_post_hook(remove)
