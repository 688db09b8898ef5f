"""The result of a run, opened again as a user would open it, and compared with what was in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.inference.load_result import free_memory, load_strict
from finetune.models.adapters import check_saved_adapter
from finetune.models.loader import torch_dtype
from finetune.run_dir.run_json import is_adapter
from finetune.utils.errors import CheckpointError

# Relative; the second for 16-bit weights, whose sums differ from one device or order of summing to another.
TOLERANCES = {"float32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
ROOM = {"float32": 2.5, "bf16": 1.5, "fp16": 1.5}  # of the files' size, which may be of 16-bit weights


def verify_result(
    folder: Path,
    *,
    base: Path | str,
    input_ids: Sequence[int],
    labels: Sequence[int],
    loss: float,
    precision: str,
    trust_remote_code: bool,
) -> str:
    """Load a saved result with plain transformers or peft and compute the loss of one conversation with it.

    Args:
        base: of an adapter.
        input_ids, labels: of one conversation, unpadded; the labels unshifted.
        loss: of the same conversation in the memory of the run, a mean over its learned tokens.

    Returns:
        A line that says what was seen.

    Raises:
        CheckpointError: a weight is missing, empty or left over; or the loss is another one.
    """
    kind = "adapter" if is_adapter(folder) else "model"
    if kind == "adapter":
        check_saved_adapter(folder)
    else:
        _check_tensors(folder)
    needed = _bytes_of(Path(base) if kind == "adapter" else folder) * ROOM[precision]
    free = free_memory()
    if needed > free:
        return (
            f"the saved {kind} has all its weights; its loss was not compared: a second copy takes "
            f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
        )
    found = _reopened_loss(folder, kind == "adapter", input_ids, labels, torch_dtype(precision), trust_remote_code)
    if not abs(found - loss) <= TOLERANCES[precision] * max(abs(loss), 0.1):
        raise CheckpointError(
            f"{folder}: the saved {kind} has a loss of {found:.5f} on a conversation for which the trained one has "
            f"{loss:.5f}: it is not what was trained; the checkpoints beside it hold the trained weights"
        )
    return f"the saved {kind} opens, and its loss is that of the trained one: {found:.4f}"


def _check_tensors(folder: Path) -> None:
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors was written")
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            empty = [name for name in names if 0 in file.get_slice(name).get_shape()]
        if empty or not names:
            raise CheckpointError(f"{path}: {empty[0] if empty else 'everything'} is empty")


def _reopened_loss(
    folder: Path, has_adapter: bool, input_ids: Sequence[int], labels: Sequence[int], dtype: Any, trusts_code: bool
) -> float:
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else, under ZeRO-3, this copy too would be divided among the ranks
    if has_adapter:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trusts_code)
    else:
        model = load_strict(folder, dtype, trusts_code=trusts_code)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([list(input_ids)])).logits[0, -len(input_ids) :]
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(labels)[1:])))


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
