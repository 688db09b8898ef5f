"""Work around internals of DeepSpeed, accelerate and transformers; each with the version it was written for.

`tests/unit/training/test_compat.py` fails when a workaround is no longer needed.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from finetune.models.loss_head import make_gradient_sparse
from finetune.models.model_config import experts_of
from finetune.models.module_kinds import unwrap_adapter
from finetune.training.nonfinite import LossScale


def zero_stage(accelerator: Accelerator) -> int | None:
    """0 to 3; None without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else plugin.zero_stage


def configure_ddp(model: Any, accelerator: Accelerator, find_unused: bool | None) -> None:
    """Hold gradients once without DeepSpeed: DDP averages them in place, a single rank has none to average.

    DDP does not search for adapter weights without a gradient where a step uses all, unless `find_unused` asks for it.
    On a single CPU rank with a tied head, the embedding's gradient is sparse: a dense one would be as large as the
    vocabulary, and the head adds to it anyway. DDP and compiled models do not support sparse gradients.
    (accelerate 1.15)
    """
    if zero_stage(accelerator) is not None:
        return
    accelerator.ddp_handler.gradient_as_bucket_view = True
    if find_unused is None and hasattr(model, "peft_config") and not _may_skip_weights(model.config):
        accelerator.ddp_handler.find_unused_parameters = False
    if accelerator.num_processes > 1:
        return
    accelerator.state.distributed_type = DistributedType.NO
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if accelerator.device.type != "cpu" or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return
    is_tied = isinstance(embedding, torch.nn.Embedding) and head is not None and embedding.weight is head.weight
    if is_tied and embedding.weight.requires_grad:
        make_gradient_sparse(embedding, head)


def _may_skip_weights(config: Any) -> bool:
    """Whether a step may use only some layers: experts, LayerDrop, or parts for images and sound."""
    text = config.get_text_config()
    return text is not config or experts_of(config)[0] > 0 or bool(getattr(text, "layerdrop", None))


def enable_sequence_parallel(model: Any, accelerator: Accelerator) -> None:
    """Let groups of ranks share each conversation: Ulysses exchanges tokens for attention heads around our attention.

    Each rank's collator cuts its part out of the row that all ranks of a group load, so accelerate's dataloader
    adapter, which broadcasts the rows of one rank to the others in turn, is disabled. (accelerate 1.15)
    """
    attention = unwrap_adapter(model).config._attn_implementation
    accelerator.parallelism_config.sp_handler.sp_attn_implementation = attention
    accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader


def write_no_recovery_script(engine: Any) -> None:
    """Keep DeepSpeed from copying zero_to_fp32.py into checkpoints: a checkpoint holds no code. (DeepSpeed 0.19.8)"""
    engine._copy_recovery_script = lambda folder: None


def current_loss_scale(accelerator: Accelerator, engine: Any) -> LossScale | None:
    """Return fp16's loss scale where it moves: torch's scaler, DeepSpeed's with and without ZeRO. (DeepSpeed 0.19.8)"""
    scaler = accelerator.scaler
    if scaler is not None and scaler.is_enabled():
        return LossScale(scaler.get_scale(), 1.0)
    optimizer = getattr(engine, "optimizer", None)
    config: Any = getattr(optimizer, "loss_scale_config", None)  # without ZeRO
    if getattr(config, "dynamic_loss_scale", False):
        return LossScale(config.cur_scale, config.min_loss_scale)
    zero_scaler: Any = getattr(optimizer, "loss_scaler", None)
    dynamic = getattr(zero_scaler, "dynamic", False)
    return LossScale(zero_scaler.cur_scale, zero_scaler.min_scale) if dynamic else None


def skip_nonfinite_steps(wrapped: Any, engine: Any, on_norm: Callable[[bool], None]) -> None:
    """Let the optimizer make no step from non-finite gradients where nothing else prevents it.

    DeepSpeed does so under ZeRO and torch's scaler in fp16; plain torch and DeepSpeed's stage 0 do not.

    Args:
        wrapped: accelerate's optimizer; `_is_overflow` makes the learning rate wait, as in DeepSpeed. (accelerate 1.15)
        engine: what the Trainer calls as its model.
        on_norm: called in each step with whether it was skipped.
    """
    inner = getattr(engine, "optimizer", None)
    if hasattr(inner, "overflow"):
        return
    optimizer = wrapped.optimizer if inner is None else inner
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside DeepSpeed's wrapper for bf16 without ZeRO

    def drop(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        skipped = not math.isfinite(torch.nn.utils.get_total_norm(gradients))
        on_norm(skipped)
        wrapped._is_overflow = skipped
        if skipped:
            for parameter in parameters:
                parameter.grad = None

    optimizer.register_step_pre_hook(drop)


def free_training_memory(model: Any, optimizer: Any, accelerator: Accelerator) -> None:
    """Free weights, gradients and optimizer states after the last step; none of them can be used any more.

    Hooks of the model and DeepSpeed's engine refer to each other, so that dropping references would free nothing.
    (accelerate 1.15, DeepSpeed 0.19.8)
    """
    accelerator.free_memory()  # DeepSpeed's buckets, and parts of its flat buffers that parameters refer to
    held: list[Any] = [vars(parameter) for parameter in model.parameters()]
    while optimizer is not None:
        held.append(vars(optimizer))
        optimizer = vars(optimizer).get("optimizer")
    for tensor in [*model.parameters(), *_tensors_in(held)]:
        if tensor.is_leaf:
            tensor.grad = None
        tensor.data = tensor.data.new_empty(0)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists and dictionaries, keys included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set):
        for inner in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _tensors_in(inner)


def separate_step_counters(optimizer: Any) -> None:
    """Give each parameter a step counter of its own after a universal checkpoint is loaded. (DeepSpeed 0.19.8)

    Under stage 3 all groups share one there, which each of them advances.
    """
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
