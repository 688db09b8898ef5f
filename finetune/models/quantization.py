"""Quantized bases: weights that bitsandbytes packs into 4 or 8 bits while they load, frozen under LoRA (QLoRA).

Sources: QLoRA https://arxiv.org/abs/2305.14314, LLM.int8 2208.07339; as transformers and bitsandbytes 0.50 do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.models.compat import keep_packing
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch


def stored_bits(name: str, config: Any) -> int | None:
    """Return 4 or 8 where the weights are stored as bitsandbytes packs them, None where they are not quantized.

    Raises:
        ConfigError: They are quantized in another way: GPTQ, AWQ, FP8, MXFP4, ...
    """
    facts = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not facts:
        return None
    facts = facts if isinstance(facts, dict) else facts.to_dict()
    method = facts.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in facts else "an unknown method")
    method = str(getattr(method, "value", method))
    if method.startswith("bitsandbytes"):
        return 4 if facts.get("load_in_4bit") else 8
    raise ConfigError(
        f"--model_name_or_path {name}: its weights are quantized ({method}), which cannot be trained here: give the "
        "model that it was made from, with --load_in_4bit True to train LoRA on it in 4 bits"
    )


def quantized_loading(bits: int | None, dtype: torch.dtype, *, is_stored: bool = False) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize weights while they load; none for `bits` None.

    Args:
        is_stored: They are packed already.
        dtype: To compute in. Packed weights are stored as elements of it, too: ZeRO-3 partitions one type of weights.
    """
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    keep_packing()
    if is_stored:
        return {}
    config = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    return {"quantization_config": config}


def is_packed_in_files(config: Any) -> bool:
    """Whether the files of a model hold packed weights."""
    return getattr(config, "quantization_config", None) is not None


def quantized_layers(empty: Any) -> dict[str, torch.nn.Module]:
    """Return the layers of a model that would be quantized, by name: linear ones, but not the head or tied ones."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(empty), *(empty._keep_in_fp32_modules or [])]
    return {
        name: module
        for name, module in empty.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def is_packed(parameter: Any) -> bool:
    """Whether a parameter holds 4-bit weights, whose elements are no numbers."""
    return getattr(parameter, "quant_state", None) is not None


def full_shape(parameter: Any) -> torch.Size:
    """Return the shape of a parameter as a whole, also of one that is packed (4 bits) or partitioned (ZeRO-3)."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape
