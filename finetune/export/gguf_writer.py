"""A plain model as one GGUF file, for llama.cpp and what is built on it.

The format and its keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of tensors and keys are
the `gguf` package's. Written for architectures whose file, read again, gives the same logits; a test shows it.
llama.cpp turns neighbours of a head's numbers by the same angle, Llama's files hold the two halves of a head beside
each other, so queries and keys change their rows:

    rows of a head    a0 a1 a2 b0 b1 b2   ->   a0 b0 a1 b1 a2 b2
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.export.gguf_vocab import vocabulary_of
from finetune.export.stored_tensors import StoredTensors
from finetune.models.loader import embedding_rows
from finetune.utils.errors import ConfigError, StorageError

# By `model_type`: the architecture's name in gguf, and whether it turns neighbours.
ARCHITECTURES = {"llama": ("LLAMA", True), "mistral": ("LLAMA", True), "qwen2": ("QWEN2", False),
                 "qwen3": ("QWEN3", False)}  # fmt: skip
# By our flag: gguf's type of most tensors, of embeddings and head, and the name of the whole.
TYPES = {
    "f32": ("F32", "F32", "ALL_F32"), "f16": ("F16", "F16", "MOSTLY_F16"), "bf16": ("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "Q8_0", "MOSTLY_Q8_0"), "q5_1": ("Q5_1", "Q8_0", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "Q8_0", "MOSTLY_Q5_0"), "q4_1": ("Q4_1", "Q8_0", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
}  # fmt: skip
INSTALL = "pip install 'gguf>=0.19'"
OTHERWISE = "llama.cpp's own convert_hf_to_gguf.py reads the merged folder, too"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: its name there and in the model's folder, its shape and type."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Any


def check_gguf(source: Path, kind: str, tokenizer: Any) -> None:
    """Find out whether a file of this type can be written, before anything is merged.

    Raises:
        ConfigError: no such type, an architecture or a tokenizer that cannot be written, gguf is not installed.
    """
    if kind not in TYPES:
        raise ConfigError(f"--gguf {kind}: expected one of {', '.join(TYPES)}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(f"--gguf needs the package gguf: {INSTALL}") from None
    config = _config(source)
    if config["model_type"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"--gguf: {config['model_type']} cannot be written, only {known}: {OTHERWISE}")
    scaling = _rope(config)
    if scaling.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"--gguf: its positions are scaled by {scaling['rope_type']}, which cannot be written")
    vocabulary_of(tokenizer, embedding_rows(tokenizer))


def write_gguf(folder: Path, kind: str, *, stop_token_id: int) -> Path:
    """Write `NAME-TYPE.gguf` into a plain model's folder, tensor by tensor; its path.

    Raises:
        StorageError: the disk refused.
    """
    import gguf
    from transformers import AutoTokenizer

    config, stored = _config(folder), StoredTensors(folder)
    path = folder / f"{folder.absolute().name}-{kind}.gguf"
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    arch_name, turns = ARCHITECTURES[config["model_type"]]
    arch = gguf.MODEL_ARCH[arch_name]
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[arch])
    tensors = list(_tensors(config, stored, arch, kind))
    rows = stored.shape(next(one.source for one in tensors if one.name == "token_embd.weight"))[0]
    try:
        _add_config(writer, config, rows, kind, folder.absolute().name)
        vocabulary_of(AutoTokenizer.from_pretrained(folder), rows).add_to(writer, stop_token_id)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for one in tensors:
            writer.add_tensor_info(one.name, *_as_bytes(one))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for one in tqdm(tensors, "gguf", unit=" tensors", disable=None, leave=False):
            writer.write_tensor_data(_value(one, stored, config, turns))
        writer.close()
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Its scaled positions, whichever version of transformers wrote the config."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _tensors(config: dict[str, Any], stored: StoredTensors, arch: Any, kind: str) -> Iterator[_Tensor]:
    import gguf

    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    most, ends, _ = TYPES[kind]
    for source in stored:
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"--gguf: {source} has no name in GGUF's {arch.name.lower()}")
        shape = tuple(stored.shape(source))
        chosen = ends if name in ("token_embd.weight", "output.weight") else most
        if len(shape) == 1:
            chosen = "F32"
        elif chosen.startswith("Q") and shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[chosen]][0]:
            chosen = "F16"
        yield _Tensor(name, source, shape, gguf.GGMLQuantizationType[chosen])


def _as_bytes(one: _Tensor) -> tuple[Any, ...]:
    """What `add_tensor_info` takes: shape, type of an element, bytes, type in the file."""
    import gguf
    import numpy as np

    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if one.kind in plain:
        kind = np.dtype(plain[one.kind])
        return one.shape, kind, math.prod(one.shape) * kind.itemsize, one.kind
    shape = gguf.quant_shape_to_byte_shape(one.shape, one.kind)
    return shape, np.dtype(np.uint8), math.prod(shape), one.kind


def _value(one: _Tensor, stored: StoredTensors, config: dict[str, Any], turns: bool) -> Any:
    import gguf

    value = stored.get(one.source).float().numpy()
    heads = config["num_attention_heads"]
    if turns and ".attn_q." in one.name:
        value = _neighbours(value, heads)
    if turns and ".attn_k." in one.name:
        value = _neighbours(value, config.get("num_key_value_heads") or heads)
    return gguf.quantize(value, one.kind)


def _neighbours(value: Any, heads: int) -> Any:
    """See the drawing at the top; `value` is [heads * width, ...]."""
    width = value.shape[0] // heads
    halves = value.reshape(heads, 2, width // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _add_config(writer: Any, config: dict[str, Any], rows: int, kind: str, name: str) -> None:
    import gguf

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or hidden // heads
    writer.add_name(f"{config['model_type']} {name}")
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind][2]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])


def _rope_factors(config: dict[str, Any]) -> Any:
    """What Llama 3.1 divides the frequencies by, one number for each pair of a head; None for other models.

    Waves shorter than `original / high` are left alone, those longer than `original / low` are stretched by `factor`,
    those in between by a mix of both (Llama 3.1, `rope_scaling` of its config).
    """
    import numpy as np

    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    waves = 2 * math.pi * theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)
