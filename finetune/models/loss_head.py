"""Let a model's head compute the loss, after a trial that loss and gradient are those of the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from finetune.chat_templates import IGNORE_INDEX
from finetune.config.hardware import Precision
from finetune.dataset.collator import Collator, pop_targets, to_device
from finetune.distributed.collectives import first_not_none
from finetune.models.loader import torch_dtype
from finetune.models.loss import Head, loss_of_head, supervised_loss, wanted_loss
from finetune.models.module_kinds import loss_module
from finetune.models.zero3 import gather_per_module
from finetune.utils.errors import first_line

# What models do to the output of their heads: a scale, a soft cap, another precision.
ELEMENTWISE = {"mul", "div", "__mul__", "__rmul__", "__truediv__", "true_divide", "tanh", "float", "to", "contiguous"}
TRIAL_TOKENS = 12


def enable_loss_head(
    model: Any, collate: Collator, *, vocab_size: int, device: torch.device | str, autocast: Precision = "float32"
) -> str | None:
    """Let the head compute the loss when it is asked for (`loss.supervised_loss`); return why it cannot, or None.

    All ranks must call this together; the reason of one is that of all.

    Args:
        collate: makes the batches of the run.
        autocast: What autocast will compute in; float32: without autocast.
    """
    module = loss_module(model)
    if module is None:
        return "it has no head of its own"
    ids = torch.randint(vocab_size, (TRIAL_TOKENS,), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[: TRIAL_TOKENS // 2] = IGNORE_INDEX
    batch = to_device(collate([{"input_ids": ids.numpy(), "labels": labels.numpy()}]), device)
    head, was_training = LossHead(module), model.training
    try:
        model.eval()
        dtype = torch_dtype(autocast)
        casts = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
        with gather_per_module(model), casts:
            reason = _reason(model, head, batch)
    except Exception as error:  # the code of a model may raise anything: its own logits are used
        reason = f"a trial failed: {first_line(error)[:200]}"
    finally:
        model.train(was_training)
    reason = first_not_none(reason)
    if reason:
        head.remove()
    return reason


def make_gradient_sparse(embedding: torch.nn.Embedding, head: torch.nn.Module) -> None:
    """Let a trained embedding have sparse gradients, added in place to those of the head that shares its weight."""
    embedding.sparse = True
    computes_loss = vars(head).get("forward")
    if isinstance(computes_loss, LossHead) and computes_loss.head.is_plain and head.bias is None:
        embedding.register_forward_pre_hook(computes_loss.before_embedding)


class LossHead:
    """Stands for the `forward` of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.head = Head(module, module.forward)
        module.forward = self

    def remove(self) -> None:
        """Let the module compute logits again."""
        del self.head.module.forward

    def before_embedding(self, embedding: Any, _: Any) -> None:
        """Let a tied embedding's gradient be there first, to be added to that of the head."""
        is_wanted = wanted_loss() is not None and torch.is_grad_enabled()
        self.head.stand_in = _PassedOnLast.apply(embedding.weight) if is_wanted else None

    @torch.compiler.disable
    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        terms = wanted_loss()
        if terms is None or not self.head.vocabulary:
            return self.head.forward(hidden, *args, **kwargs)
        return loss_of_head(self.head, terms, hidden)


class _PassedOnLast(torch.autograd.Function):
    """The identity: autograd runs the backward passes of functions that are called after it first."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _reason(model: Any, head: LossHead, batch: dict[str, Any]) -> str | None:
    """Compare loss and gradient of the hidden states, made by the head, with those of the model's own logits."""
    module, is_partitioned = head.head.module, any(hasattr(weight, "ds_id") for weight in model.parameters())
    entered: list[torch.Tensor] = []
    recorded: list[_Recorded] = []

    def as_input(_: Any, args: tuple) -> tuple:
        entered.append(args[0].detach().requires_grad_(not is_partitioned))
        return (entered[-1], *args[1:])

    def outcome() -> tuple[torch.Tensor, ...]:
        inputs = dict(batch)
        targets = pop_targets(inputs)
        loss, outputs = supervised_loss(model, inputs, targets, scale=1 / len(targets.tokens))
        recorded.append(outputs.logits)
        if is_partitioned:
            return (loss,)
        return loss.detach(), *torch.autograd.grad(loss, entered[-1:])

    with ExitStack() as hooks, torch.set_grad_enabled(not is_partitioned):
        hooks.callback(module.register_forward_pre_hook(as_input).remove)
        with ExitStack() as recording:
            recording.callback(module.register_forward_hook(lambda *given: _Recorded.of(given[2])).remove)
            wanted = outcome()
        if len(entered) != 1:
            return f"its head is called {len(entered)} times"
        if not isinstance(recorded[0], _Recorded):
            return "its logits are not its head's output, scaled or capped"
        head.head.after, head.head.vocabulary = tuple(recorded[0].steps), recorded[0].shape[-1]
        found = outcome()
    is_16_bit = not {entered[0].dtype, recorded[0].dtype}.isdisjoint((torch.float16, torch.bfloat16))
    for own, other in zip(wanted, found, strict=True):
        difference, scale = (own - other).abs().max().item(), own.abs().max().item()
        if not difference <= (5e-2 if is_16_bit else 1e-4) * scale:
            return f"in a trial, its loss or gradient differs by {difference / scale:.1e}"
    return None


class _Recorded(torch.Tensor):
    """The output of a head, and the elementwise functions that are applied to it."""

    steps: list[Callable[[torch.Tensor], torch.Tensor]]

    @classmethod
    def of(cls, output: torch.Tensor, steps: Any = ()) -> _Recorded:
        recorded = output.as_subclass(cls)
        recorded.steps = [*steps]
        return recorded

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        source = args[0] if args else None
        if not isinstance(source, cls) or getattr(function, "__name__", "") not in ELEMENTWISE:
            return result
        others = (*args[1:], *(kwargs or {}).values())
        if any(isinstance(other, torch.Tensor) for other in others):
            return result
        step = partial(lambda rest, options, values: function(values, *rest, **options), args[1:], kwargs or {})
        return cls.of(result, [*source.steps, *([step] if result.data_ptr() != source.data_ptr() else [])])
