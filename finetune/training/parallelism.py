"""What DDP, ZeRO and Ulysses must be told before the first step, beyond what the Trainer tells them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


def zero_stage(accelerator: Accelerator) -> int | None:
    """0 to 3; None without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


def use_gradient_views(model: Any, accelerator: Accelerator) -> None:
    """Without DeepSpeed: DDP averages the gradients where they lie, and a lone rank has none to average with.

    On a lone CPU the rows that a batch met are added to the gradient of the head that shares them, where a dense
    gradient of the embedding would be as large as the vocabulary; DDP does not take sparse ones.
    """
    if zero_stage(accelerator) is not None:
        return
    accelerator.ddp_handler.gradient_as_bucket_view = True
    if accelerator.num_processes > 1:
        return
    accelerator.state.distributed_type = DistributedType.NO
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, torch.nn.Embedding) and accelerator.device.type == "cpu" and head is not None:
        embedding.sparse = embedding.weight is head.weight and embedding.weight.requires_grad


def enable_sequence_parallel(model: Any, accelerator: Accelerator) -> None:
    """Groups of ranks share each row: Ulysses exchanges its tokens for attention heads around our own attention.

    Each rank's collator cuts out its part of the row that all of its group load, so that accelerate's adapter, which
    sends the rows of one rank to the others in turn, is left out.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    accelerator.parallelism_config.sp_handler.sp_attn_implementation = base.config._attn_implementation
    accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader


def fix_universal_optimizer_state(optimizer: Any, group_settings: Iterable[Mapping[str, Any]]) -> None:
    """Undo what DeepSpeed (0.19.8) does wrong when stage 3 loads the universal form.

    All groups share one counter of steps, which each of them then advances, and the first group's weight decay goes to
    all. `group_settings`: what each group of parameters is to have.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    for group, settings in zip(optimizer.param_groups, group_settings, strict=False):
        group.update(settings)
