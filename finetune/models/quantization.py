"""Quantized bases: weights that bitsandbytes packs into 4 or 8 bits while they load, frozen under LoRA (QLoRA), and
weights that are stored in another format and dequantized while they load.

Sources: QLoRA https://arxiv.org/abs/2305.14314, LLM.int8 2208.07339; as transformers and bitsandbytes 0.50 do it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from finetune.models.compat import flatten_inputs_of_8_bits, keep_packing
from finetune.models.module_kinds import module_kinds
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

# Formats that transformers dequantizes while weights load: the class of its config, and the package that it needs.
DEQUANTIZED = {
    "mxfp4": ("Mxfp4Config", None),
    "fp8": ("FineGrainedFP8Config", None),
    "compressed-tensors": ("CompressedTensorsConfig", "compressed-tensors"),
}
READERS = {"gptq": "gptqmodel", "awq": "gptqmodel", "quanto": "optimum-quanto", "hqq": "hqq", "torchao": "torchao"}


def base_bits(name: str, config: Any, wanted: int | None = None) -> int | None:
    """Return 4 or 8 where bitsandbytes packs the weights, in the files or while they load; None for plain weights.

    Args:
        wanted: bits to pack plain weights into.

    Raises:
        ConfigError: They are quantized in a way that cannot be trained here (GPTQ, AWQ, ...), or in another than is
            wanted, or a package is missing.
    """
    method = stored_method(config)
    if method is None:
        return wanted
    stored = (4 if _facts(config).get("load_in_4bit") else 8) if method.startswith("bitsandbytes") else None
    if wanted not in (None, stored) and (stored or method in DEQUANTIZED):
        how = f"in {stored} bits" if stored else f"as {method}, and are dequantized while they load"
        raise ConfigError(f"--load_in_{wanted}bit True: the weights of {name} are stored {how}: leave it out")
    if stored:
        return stored
    if method in DEQUANTIZED:
        package = DEQUANTIZED[method][1]
        if package is None or find_spec(package.replace("-", "_")):
            return None
        raise ConfigError(
            f"--model_name_or_path {name}: its weights are stored as {method}, which {package} reads: pip install "
            f"{package}"
        )
    reader = f" for {READERS[method]}" if method in READERS else ""
    raise ConfigError(
        f"--model_name_or_path {name}: its weights are quantized ({method}){reader}, which cannot be trained here: "
        "give the model that it was made from, with --load_in_4bit True to train LoRA on it in 4 bits"
    )


def stored_method(config: Any) -> str | None:
    """Return how the weights of a model are quantized in its files, or None."""
    facts = _facts(config)
    if not facts:
        return None
    method = facts.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in facts else "an unknown method")
    return str(getattr(method, "value", method))


def is_packed_in_files(config: Any) -> bool:
    """Whether the files of a model hold quantized weights."""
    return stored_method(config) is not None


def _facts(config: Any) -> dict[str, Any]:
    facts = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    return facts if isinstance(facts, dict) else facts.to_dict() if facts else {}


def quantized_loading(bits: int | None, dtype: torch.dtype, config: Any, empty: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for weights that are quantized: stored so, or while they load.

    Args:
        bits: 4 or 8 under bitsandbytes; None for plain weights, which are dequantized if they are stored otherwise.
        dtype: To compute in. Packed weights are stored as elements of it, too: ZeRO-3 partitions one type of weights.
        config: Of the model's files.
        empty: The model on the meta device.
    """
    import transformers

    method = stored_method(config)
    if method in DEQUANTIZED:
        return {"quantization_config": getattr(transformers, DEQUANTIZED[method][0])(dequantize=True)}
    if bits is None and method is None:
        return {}
    keep_packing()
    flatten_inputs_of_8_bits()
    if method:
        return {}
    kept = _kept_whole(empty)
    packing = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    if bits == 4:
        packing = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=kept,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    return {"quantization_config": packing}


def quantized_layers(empty: Any) -> dict[str, torch.nn.Module]:
    """Return the layers of a model that would be quantized, by name: linear ones, but not all of them."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*_kept_whole(empty), *(empty._keep_in_fp32_modules or [])]
    return {
        name: module
        for name, module in empty.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def _kept_whole(empty: Any) -> list[str]:
    """Return the layers that are not quantized: head, tied ones, and those whose weight the code reads itself."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return [*get_keys_to_not_convert(empty), *module_kinds(empty).read_past(empty)]


def is_packed(parameter: Any) -> bool:
    """Whether a parameter holds 4-bit weights, whose elements are no numbers."""
    return getattr(parameter, "quant_state", None) is not None
