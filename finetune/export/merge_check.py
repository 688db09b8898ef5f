"""The merged model, opened by plain transformers, against what was trained: their logits on a few conversations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.chat_templates import ChatFormat, UnrenderableError, tokenize_conversation
from finetune.conversation import Turn
from finetune.inference.load_result import free_memory, load_strict
from finetune.utils.errors import CheckpointError

CONVERSATIONS = (
    (Turn("human", "What do you know about tides?"), Turn("model", "The moon pulls the sea, and the coast waits.")),
    (Turn("human", "请用一句话介绍你自己。"), Turn("model", "我是一个语言模型，愿意回答你的问题。")),
    (
        Turn("human", "def add(a, b):"), Turn("model", "    return a + b"),
        Turn("human", "2 + 3?"), Turn("model", "5"),
    ),
)  # fmt: skip
# Of the reference's spread around its mean: rounding a model's weights moves its logits by about so much.
TOLERANCES = {"float32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
MEMORY_FRACTION = 1.2


def rows_for(chat_format: ChatFormat, longest: int | None) -> list[list[int]]:
    """Ids of the conversations that the format can express, at most as many as the model has positions."""
    rows = []
    for turns in CONVERSATIONS:
        try:
            rows.append(tokenize_conversation(chat_format, turns).input_ids[:longest])
        except UnrenderableError:
            continue
    return rows


def logits_of(model: Any, rows: Sequence[Sequence[int]]) -> list[Any]:
    """Float32 logits on the CPU, one row at a time."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu() for ids in rows]


def missing_memory(stored_bytes: int) -> str | None:
    """Why the proof cannot be made here, None where it can: a model is opened in float32."""
    needed, free = int(2 * stored_bytes * MEMORY_FRACTION), free_memory()
    if needed <= free:
        return None
    return f"opening it takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"


def compare_logits(
    folder: Path,
    expected: Sequence[Any],
    rows: Sequence[Sequence[int]],
    precisions: Iterable[str],
    *,
    trusts_code: bool,
) -> str:
    """Open the merged model and compare; a line that says what was seen.

    Args:
        expected: logits of what was trained.
        precisions: in which the merged model is stored, and in which it was trained.

    Raises:
        CheckpointError: weights are missing or left over, or it is another model.
    """
    import torch

    merged = load_strict(folder, torch.float32, trusts_code=trusts_code)
    furthest, same, positions = 0.0, 0, 0
    for seen, wanted in zip(logits_of(merged, rows), expected, strict=True):
        width = min(seen.shape[-1], wanted.shape[-1])
        seen, wanted = seen[:, :width], wanted[:, :width]
        distance = (seen - wanted).norm() / (wanted - wanted.mean()).norm()
        furthest = max(furthest, float(distance)) if torch.isfinite(distance) else float("inf")
        same += int((seen.argmax(-1) == wanted.argmax(-1)).sum())
        positions += len(seen)
    tolerance = max(TOLERANCES[one] for one in precisions)
    if not furthest <= tolerance:
        raise CheckpointError(
            f"the merged model is not the trained one: their logits are {furthest:.2%} apart, {tolerance:.1%} is what "
            f"rounding could do; {folder} was not kept"
        )
    return (
        f"its logits are those of what was trained ({furthest:.1e} apart), the first choice is the same at {same} of "
        f"{positions} positions"
    )
