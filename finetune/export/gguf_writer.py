"""Write a plain model as one GGUF file, for llama.cpp and programs built on it.

Format and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` package has the names of tensors
and keys. Only architectures whose file is tested to give the same logits are supported. The rotary embedding of
llama.cpp rotates adjacent elements of a head, that of transformers the two halves, so rows of queries and keys move:

    rows of a head    a0 a1 a2 b0 b1 b2   ->   a0 b0 a1 b1 a2 b2
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from finetune.models.loader import embedding_rows
from finetune.models.stored_tensors import StoredTensors
from finetune.utils.atomic_io import replacing
from finetune.utils.errors import ConfigError
from finetune.utils.user_files import read_json_object

# By `model_type`: name of the architecture in gguf, and whether it rotates adjacent elements.
ARCHITECTURES = {"llama": ("LLAMA", True), "mistral": ("LLAMA", True), "qwen2": ("QWEN2", False),
                 "qwen3": ("QWEN3", False)}  # fmt: skip
# By value of --gguf: type of most tensors, type of embeddings and head, and name of the file type.
TYPES = {
    "f32": ("F32", "F32", "ALL_F32"), "f16": ("F16", "F16", "MOSTLY_F16"), "bf16": ("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "Q8_0", "MOSTLY_Q8_0"), "q5_1": ("Q5_1", "Q8_0", "MOSTLY_Q5_1"),
    "q5_0": ("Q5_0", "Q8_0", "MOSTLY_Q5_0"), "q4_1": ("Q4_1", "Q8_0", "MOSTLY_Q4_1"),
    "q4_0": ("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
}  # fmt: skip
ALTERNATIVE = "merge without --gguf, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name there and in the model's folder, its shape and `gguf.GGMLQuantizationType`."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: Any


def check_gguf(source: Path, tokenizer: Any) -> None:
    """Check that a file of this model can be written, before anything is merged."""
    config = read_json_object(source / "config.json")
    if config["model_type"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"--gguf: {config['model_type']} is not supported, only {known}: {ALTERNATIVE}")
    scaling = _rope(config)
    if scaling["rope_type"] not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"--gguf: rope_type {scaling['rope_type']} is not supported: {ALTERNATIVE}")
    vocabulary_of(tokenizer, embedding_rows(tokenizer))


def write_gguf(folder: Path, kind: str, *, stop_token_id: int) -> Path:
    """Write `NAME-TYPE.gguf` into a plain model's folder, tensor by tensor; return its path."""
    config, stored = read_json_object(folder / "config.json"), StoredTensors(folder)
    path = folder / f"{folder.absolute().name}-{kind}.gguf"
    arch_name, rotates_adjacent = ARCHITECTURES[config["model_type"]]
    arch = gguf.MODEL_ARCH[arch_name]
    tensors = list(_tensors(config, stored, arch, kind))
    vocab_size = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    with replacing(path) as part:
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[arch])
        _add_config(writer, config, vocab_size, kind, folder.absolute().name)
        vocabulary_of(AutoTokenizer.from_pretrained(folder), vocab_size).add_to(writer, stop_token_id)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, *_tensor_info(tensor))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tqdm(tensors, "gguf", unit=" tensors", disable=None, leave=False):
            writer.write_tensor_data(_quantized(tensor, stored, config, rotates_adjacent))
        writer.close()
    return path


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of the rotary embedding, whichever version of transformers wrote the config."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def _tensors(config: dict[str, Any], stored: StoredTensors, arch: Any, kind: str) -> Iterator[_Tensor]:
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    default_type, end_type, _ = TYPES[kind]
    for source in stored:
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(f"--gguf: {source} has no name in the architecture {arch.name.lower()} of GGUF")
        shape = stored.shape(source)
        type_name = end_type if name in ("token_embd.weight", "output.weight") else default_type
        if len(shape) == 1:
            type_name = "F32"
        elif type_name.startswith("Q") and shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]:
            type_name = "F16"
        yield _Tensor(name, source, shape, gguf.GGMLQuantizationType[type_name])


def _tensor_info(tensor: _Tensor) -> tuple[Any, ...]:
    """Return the arguments of `add_tensor_info`: shape, numpy type, size in bytes, type in the file."""
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if tensor.type in plain:
        dtype = np.dtype(plain[tensor.type])
        return tensor.shape, dtype, math.prod(tensor.shape) * dtype.itemsize, tensor.type
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
    return shape, np.dtype(np.uint8), math.prod(shape), tensor.type


def _quantized(tensor: _Tensor, stored: StoredTensors, config: dict[str, Any], rotates_adjacent: bool) -> Any:
    value = stored[tensor.source].float().numpy()
    heads = config["num_attention_heads"]
    if rotates_adjacent and ".attn_q." in tensor.name:
        value = _interleave_halves(value, heads)
    if rotates_adjacent and ".attn_k." in tensor.name:
        value = _interleave_halves(value, config.get("num_key_value_heads") or heads)
    return gguf.quantize(value, tensor.type)


def _interleave_halves(value: Any, heads: int) -> Any:
    """Interleave the two halves of each head, as in the module's docstring; `value` is [heads * head_dim, ...]."""
    head_dim = value.shape[0] // heads
    halves = value.reshape(heads, 2, head_dim // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def _add_config(writer: Any, config: dict[str, Any], vocab_size: int, kind: str, name: str) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_name(f"{config['model_type']} {name}")
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind][2]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])


def _rope_factors(config: dict[str, Any]) -> Any:
    """Return the divisors of the rotary frequencies of Llama 3.1 [head_dim / 2]; None for other models.

    Wavelengths below `original / high` are unchanged, those above `original / low` are multiplied by `factor`, those in
    between are interpolated (`rope_scaling` in the config of Llama 3.1).
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    rotations = rope["original_max_position_embeddings"] / wavelengths
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    unscaled = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - unscaled) / rope["factor"] + unscaled)).astype(np.float32)


# ---- the tokenizer: byte-level BPE (`gpt2` in llama.cpp), or BPE over characters with byte fallback (`llama`), which
# merges the pair with the highest score

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
# llama.cpp's names of the pre-tokenizers with these regular expressions in tokenizer.json.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
OTHER_CHARACTERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PRE_TOKENIZERS = {
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{OTHER_CHARACTERS}": "qwen2",
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{OTHER_CHARACTERS}": "llama-bpe",
}
SPACE = "\u2581"


@dataclass
class Vocabulary:
    """What GGUF stores of a tokenizer."""

    model: str  # tokenizer model of llama.cpp, `gpt2` or `llama`
    pre_tokenizer: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]  # tokens by id
    types: list[int]  # their `gguf.TokenType`
    tokenizer: Any
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add_to(self, writer: Any, stop_token_id: int) -> None:
        """Add the vocabulary to a `gguf.GGUFWriter`; a generation ends at `stop_token_id`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_eos_token_id(stop_token_id)
        writer.add_eot_token_id(stop_token_id)
        for name in ("bos", "unk", "pad"):
            token_id = getattr(self.tokenizer, f"{name}_token_id")
            if token_id is not None:
                getattr(writer, f"add_{name}_token_id")(token_id)
        ids = self.tokenizer("a")["input_ids"]
        writer.add_add_bos_token(bool(ids) and ids[0] == self.tokenizer.bos_token_id)
        writer.add_add_eos_token(False)
        if self.model == "llama":
            ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            writer.add_add_space_prefix(self.tokenizer.convert_ids_to_tokens(ids)[0].startswith(SPACE))
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        if template:
            writer.add_chat_template(template)


def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer, padded to the number of embedding rows."""
    if not tokenizer.is_fast:
        raise ConfigError(f"--gguf: the tokenizer is Python code, and GGUF stores tables only: {ALTERNATIVE}")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"].get("type", "BPE") != "BPE":
        raise ConfigError(
            f"--gguf: the tokenizer model {parts['model']['type']} is not supported, only BPE: {ALTERNATIVE}"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    tokens, types = _tokens(tokenizer, vocab_size)
    steps = list(_flatten(parts["pre_tokenizer"]))
    if any(step["type"] == "ByteLevel" for step in steps):
        return Vocabulary("gpt2", _pre_tokenizer_name(steps), tokens, types, tokenizer, merges)
    if not parts["model"].get("byte_fallback"):
        raise ConfigError(f"--gguf: the tokenizer is neither byte-level nor has it a byte fallback: {ALTERNATIVE}")
    score_of = {merge.replace(" ", ""): -float(rank) for rank, merge in enumerate(merges, start=1)}
    for token_id, token in enumerate(tokens):
        if types[token_id] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[token_id] = BYTE
    lowest = -float(len(merges) + 1)
    scores = [score_of.get(token, lowest) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, tokenizer, scores=scores)


def _tokens(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{token_id}]" for token_id in range(vocab_size)], [UNUSED] * vocab_size
    for token, token_id in tokenizer.get_vocab().items():
        tokens[token_id], types[token_id] = token, NORMAL
    for token_id, token in tokenizer.added_tokens_decoder.items():
        tokens[token_id], types[token_id] = str(token), CONTROL if token.special else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _flatten(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, those inside of sequences included."""
    if step is None:
        return []
    return (
        [part for inner in step["pretokenizers"] for part in _flatten(inner)] if step["type"] == "Sequence" else [step]
    )


def _pre_tokenizer_name(steps: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer."""
    others = [step for step in steps if step["type"] != "ByteLevel"]
    if not others and all(step.get("use_regex", True) for step in steps):
        return "gpt-2"
    if [step["type"] for step in others] == ["Digits"] and others[0]["individual_digits"]:
        return "smollm"
    expressions = [step["pattern"].get("Regex") for step in others if step["type"] == "Split"]
    if len(others) == len(expressions) == 1 and expressions[0] in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[expressions[0]]
    kinds = ", ".join(step["type"] for step in steps)
    raise ConfigError(f"--gguf: the pre-tokenizer of this model ({kinds}) is not supported: {ALTERNATIVE}")
