"""Verify saved models: load them with plain transformers or peft and compare them with what was trained.

A run compares the loss of one conversation, a merge the logits of a few.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune.chat_templates import ChatFormat, UnrenderableError, tokenize_conversation
from finetune.config.hardware import Precision
from finetune.conversation import Conversation, Turn
from finetune.inference.load_result import load_saved_adapter, load_strict, memory_shortage
from finetune.models.adapters import check_saved_adapter
from finetune.models.auto_class import auto_class
from finetune.models.loader import embedding_rows, torch_dtype
from finetune.models.quantization import quantized_loading
from finetune.run_dir.run_json import is_adapter
from finetune.utils.errors import CheckpointError

# Relative difference of losses. With 16-bit weights, sums depend on the device and the order of summation.
LOSS_TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
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


def verify_result(
    folder: Path,
    *,
    base: Path | str,
    input_ids: Sequence[int],
    labels: Sequence[int],
    loss: float,
    precision: Precision,
    trust_remote_code: bool,
    base_bits: int | None = None,
) -> str:
    """Load a saved result and compare its loss on one conversation with that of the model in memory.

    Returns a line for the user; a `CheckpointError` if a weight is missing, empty or unexpected, or the loss differs.

    Args:
        base: Base model of an adapter.
        base_bits: 4 or 8 where the base was quantized.
        labels: Those of the unpadded conversation, unshifted.
        loss: Loss of the model in memory, a mean over supervised tokens.
    """
    has_adapter = is_adapter(folder)
    kind, weights_folder = ("adapter", Path(base)) if has_adapter else ("model", folder)
    if has_adapter:
        check_saved_adapter(folder)
    else:
        _check_no_empty_tensors(folder)
    stored = sum(path.stat().st_size for path in weights_folder.glob("*.safetensors"))
    shortage = memory_shortage(stored * MEMORY_FACTORS[precision])
    if shortage:
        return f"the saved {kind} has all its weights; its loss was not compared: {shortage}"
    saved_loss = _loss_of_saved(
        folder, str(base), has_adapter, input_ids, labels, torch_dtype(precision), trust_remote_code, base_bits
    )
    if not abs(saved_loss - loss) <= LOSS_TOLERANCES[precision] * max(abs(loss), 0.1):
        raise CheckpointError(
            f"{folder}: the saved {kind} differs from the trained one: its loss on a conversation is {saved_loss:.5f}, "
            f"expected {loss:.5f}. The checkpoints in the same folder hold the trained weights"
        )
    return f"the saved {kind} loads and has the loss of the trained one: {saved_loss:.4f}"


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


def _loss_of_saved(
    folder: Path,
    base: str,
    has_adapter: bool,
    input_ids: Sequence[int],
    labels: Sequence[int],
    dtype: torch.dtype,
    trusts_code: bool,
    bits: int | None,
) -> float:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 this copy would be partitioned, too
    if has_adapter:
        model = _load_adapter(folder, base, dtype, trusts_code, bits)
    else:
        model = load_strict(folder, dtype, trusts_code=trusts_code)
    with torch.no_grad():
        logits = (
            model.eval()(input_ids=torch.tensor([list(input_ids)], device=model.device))
            .logits[0, -len(input_ids) :]
            .cpu()
        )
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(labels)[1:])))


def _load_adapter(folder: Path, base: str, dtype: torch.dtype, trusts_code: bool, bits: int | None) -> Any:
    """Load an adapter with plain peft; one of a model with images on its base, since peft would take its text alone."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(base, trust_remote_code=trusts_code)
    options = {"dtype": dtype, "trust_remote_code": trusts_code, **quantized_loading(bits, dtype, config)}
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
