"""Verify saved models: load them with plain transformers or peft and compare them with what was trained.

A run compares the tensors and notes the loss of one conversation, a merge compares the logits of a few.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune.chat_templates import ChatFormat, UnrenderableError, tokenize_conversation
from finetune.config.hardware import Precision
from finetune.conversation import Conversation, Turn
from finetune.distributed.collectives import get_rank
from finetune.inference.load_result import load_saved_adapter, load_strict, memory_shortage
from finetune.models.adapters import check_saved_adapter
from finetune.models.auto_class import auto_class, empty_model
from finetune.models.loader import embedding_rows, torch_dtype
from finetune.models.model_folder import local_model_dir, stored_bytes
from finetune.models.quantization import is_packed_in_files, quantized_loading
from finetune.models.zero3 import gathered
from finetune.run_dir.run_json import is_adapter
from finetune.utils.errors import CheckpointError, format_names

logger = logging.getLogger(__name__)

# Difference of losses over `LOSS_TOKENS` tokens, relative to at least 1. With 16-bit weights, sums depend on the device
# and the order of summation.
LOSS_TOKENS = 64
LOSS_TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
# Memory for a second copy, relative to the size of the files, which may hold 16-bit weights.
MEMORY_FACTORS: dict[Precision, float] = {"float32": 2.5, "bf16": 1.5, "fp16": 1.5}
# Difference of logits relative to their spread around the mean: about what rounding the weights changes.
LOGITS_TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
CONVERSATIONS = (
    (Turn("human", "What do you know about tides?"), Turn("model", "The moon pulls the sea, and the coast waits.")),
    (Turn("human", "请用一句话介绍你自己。"), Turn("model", "我是一个语言模型，愿意回答你的问题。")),
    (
        Turn("human", "def add(a, b):"), Turn("model", "    return a + b"),
        Turn("human", "2 + 3?"), Turn("model", "5"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class TensorDigest:
    """A tensor of a trained model by its shape, type and values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorDigest:
        """Return the digest of a tensor on any device."""
        values: Any = tensor.detach().flatten().contiguous().view(torch.uint8).cpu().numpy()
        return cls(tuple(tensor.shape), tensor.dtype, xxhash.xxh3_64_intdigest(values))


def digests_to_save(model: Any) -> dict[str, TensorDigest]:
    """Return the tensors that a saved result holds, by name: of an adapter those that are trained, else all. All ranks.

    Partitioned ones (ZeRO-3) are gathered one by one; other ranks than 0 may return no digests.
    """
    is_adapter, digests = hasattr(model, "peft_config"), {}
    if is_adapter and model.active_peft_config.is_prompt_learning:
        with gathered(weight for weight in model.parameters() if weight.requires_grad):
            embeddings = model.get_prompt_embedding_to_save(model.active_adapter)
        digests["prompt_encoder.default.embedding.weight"] = TensorDigest.of(embeddings)
    for name, parameter in model.named_parameters():
        if is_adapter and (name.startswith("prompt_encoder.") or not parameter.requires_grad):
            continue
        with gathered([parameter]):
            if get_rank() == 0:
                digests[name] = TensorDigest.of(parameter)
    return digests


def verify_result(
    folder: Path,
    *,
    base: Path | str,
    trained: Mapping[str, TensorDigest],
    input_ids: Sequence[int],
    labels: Sequence[int],
    loss: float,
    precision: Precision,
    trust_remote_code: bool,
    base_bits: int | None = None,
) -> str:
    """Load a saved result, compare its tensors with those in memory, and its loss on one conversation.

    Returns:
        A line for the user; it and a warning say where the loss differs by more than the precision explains.

    Args:
        base: Base model of an adapter.
        trained: Tensors of the model in memory, from `digests_to_save`.
        base_bits: 4 or 8 where the base was quantized.
        labels: Those of the unpadded conversation, unshifted.
        loss: Loss of the model in memory, a mean over supervised tokens.

    Raises:
        CheckpointError: A weight is missing, empty, unexpected, or not the one in memory.
    """
    has_adapter = is_adapter(folder)
    kind, weights_folder = ("adapter", local_model_dir(str(base))) if has_adapter else ("model", folder)
    if has_adapter:
        check_saved_adapter(folder)
    else:
        _check_no_empty_tensors(folder)
    # peft loads whole modules in the precision of the base, LoRA matrices in that of the file.
    whole = {digest.dtype for name, digest in trained.items() if ".lora_" not in name}
    loaded: Precision = "float32" if torch.float32 in whole else precision
    shortage = memory_shortage((stored_bytes(weights_folder) or 0) * MEMORY_FACTORS[loaded])
    if shortage:
        return f"the saved {kind} has all its weights; they were not compared: {shortage}"
    unset_hf_deepspeed_config()  # under ZeRO-3 this copy would be partitioned, too
    dtype = torch_dtype(loaded)
    if has_adapter:
        model = _load_adapter(folder, str(base), dtype, trust_remote_code, base_bits)
    else:
        model = load_strict(folder, dtype, trusts_code=trust_remote_code)
    differing = _differing_tensors(model, trained)
    if differing:
        raise CheckpointError(
            f"{folder}: the saved {kind} differs from the trained one: {format_names(differing)}. The checkpoints in "
            "the same folder hold the trained weights"
        )
    saved_loss = _loss_of(model, input_ids, labels)
    tokens = sum(label >= 0 for label in labels[1:])
    line = f"the {len(trained):,} tensors of the saved {kind} are those in memory; loss over {tokens:,} tokens "
    tolerance = LOSS_TOLERANCES[precision] * max(1.0, (LOSS_TOKENS / tokens) ** 0.5)
    if not abs(saved_loss - loss) <= tolerance * max(abs(loss), 1.0):
        logger.warning(f"{folder}: {line}{saved_loss:.4f}, expected {loss:.4f}: see how {kind}s are loaded")
        return f"{line}{saved_loss:.4f}, in memory {loss:.4f}"
    return f"{line}{saved_loss:.4f}"


def _differing_tensors(model: Any, trained: Mapping[str, TensorDigest]) -> list[str]:
    """Return the names of tensors that a loaded model lacks or has with other values.

    PiSSA and OLoRA are saved with the initial matrices behind the trained ones.
    """
    loaded, differing = dict(model.named_parameters()), []
    for name, digest in trained.items():
        tensor = loaded.get(name)
        if tensor is not None and ".lora_" in name and tensor.ndim == len(digest.shape):
            tensor = tensor[tuple(slice(size) for size in digest.shape)]
        if tensor is None or TensorDigest.of(tensor.to(digest.dtype)) != digest:
            differing.append(name)
    return differing


def _check_no_empty_tensors(folder: Path) -> None:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors was written")
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            empty = [name for name in names if 0 in file.get_slice(name).get_shape()]
        if empty or not names:
            raise CheckpointError(f"{path}: {empty[0] if empty else 'the file'} is empty")


def _loss_of(model: Any, input_ids: Sequence[int], labels: Sequence[int]) -> float:
    ids = torch.tensor([list(input_ids)], device=model.device)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, -len(input_ids) :].cpu()
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(labels)[1:])))


def _load_adapter(folder: Path, base: str, dtype: torch.dtype, trusts_code: bool, bits: int | None) -> Any:
    """Load an adapter with plain peft; one of a model with images on its base, since peft would take its text alone."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(base, trust_remote_code=trusts_code)
    empty = empty_model(config, trust_remote_code=trusts_code)
    options = {"dtype": dtype, "trust_remote_code": trusts_code, **quantized_loading(bits, dtype, config, empty)}
    if bits or is_packed_in_files(config):  # transformers would load it beside the trained model on the GPU
        options["device_map"] = {"": "cpu"}
    cls = auto_class(config)
    if cls is AutoModelForCausalLM:
        return AutoPeftModelForCausalLM.from_pretrained(folder, **options)
    model = cls.from_pretrained(base, **options)
    rows = embedding_rows(AutoTokenizer.from_pretrained(folder))
    if rows > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows)
    return load_saved_adapter(model, folder)


def verification_rows(chat_format: ChatFormat, max_length: int | None) -> list[list[int]]:
    """Tokenize the conversations that the format can express, each cut to `max_length` tokens."""
    rows = []
    for turns in CONVERSATIONS:
        try:
            rows.append(tokenize_conversation(chat_format, Conversation(tuple(turns))).input_ids[:max_length])
        except UnrenderableError:
            continue
    return rows


def logits_of(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Compute float32 logits [T, V] of each row, on the CPU."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu() for ids in rows]


def compare_logits(
    folder: Path,
    expected: Sequence[torch.Tensor],
    rows: Sequence[Sequence[int]],
    precisions: Iterable[Precision],
    *,
    trusts_code: bool,
) -> str:
    """Compare the logits of a merged model with `expected`, those of what was trained; return a line for the user.

    The tolerance is that of the coarser of the two precisions.
    """
    merged = load_strict(folder, torch.float32, trusts_code=trusts_code)
    distance, same_choices, positions = 0.0, 0, 0
    for logits, target in zip(logits_of(merged, rows), expected, strict=True):
        width = min(logits.shape[-1], target.shape[-1])
        logits, target = logits[:, :width], target[:, :width]
        relative = float((logits - target).norm() / (target - target.mean()).norm())
        distance = max(distance, relative) if relative < float("inf") else float("inf")
        same_choices += int((logits.argmax(-1) == target.argmax(-1)).sum())
        positions += len(logits)
    tolerance = max(LOGITS_TOLERANCES[precision] for precision in precisions)
    if not distance <= tolerance:
        raise CheckpointError(
            f"the merged model is not the trained one: their logits differ by {distance:.2%}, rounding explains at "
            f"most {tolerance:.1%}; {folder} was not kept"
        )
    return (
        f"its logits are those of what was trained (they differ by {distance:.1e}), the first choice is the same at "
        f"{same_choices} of {positions} positions"
    )
