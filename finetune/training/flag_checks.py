"""Build what the flags of transformers name, before data and weights are read: arguments, optimizer, schedule.

Whatever transformers or torch refuses is reported with the flags that cause it: those without which it is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from finetune.utils.errors import raise_faults

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What the constructors raise for values that they do not take.
REFUSALS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
IGNORES_OPTIONS = ("constant", "constant_with_warmup")  # schedules that drop --lr_scheduler_kwargs
NEEDS_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that look for layers by name
LARGE, ADAM_BYTES = 512, 8.0  # width of a layer whose states are measured; bytes where they cannot be
STEPS = 1000  # of the schedule that is built where the data decide the number


def check_training_flags(values: Mapping[str, Any], given: Mapping[str, Any], *, builds_optimizer: bool) -> None:
    """Build `TrainingArguments`, the optimizer for one small parameter, and its schedule.

    Args:
        values: keyword arguments of `TrainingArguments`. Devices and process groups are not touched, and what depends
            on them is left out: the hardware may be that of another host.
        given: the training flags that the user gave, by name.
        builds_optimizer: False where DeepSpeed builds it.

    Raises:
        ConfigError: every fault, each beginning with the flags and their values.
    """
    values = {**values, "use_cpu": True, "tf32": None, "deepspeed": None, "save_on_each_node": False}
    faults = []
    while (refusal := _refusal(values, builds_optimizer)) is not None:
        without = {name: {other: values[other] for other in values if other != name} for name in given}
        causes = [name for name in given if name in values and _refusal(without[name], builds_optimizer) != refusal]
        shown = " ".join(f"--{name} {given[name]}" for name in causes) or "the training flags"
        faults.append(f"{shown}: {refusal}")
        if not causes:
            break
        for name in causes:
            del values[name]
    raise_faults(faults)


def _refusal(values: Mapping[str, Any], builds_optimizer: bool) -> str | None:
    """Return why these values are refused, in one line, or None."""
    import torch

    try:
        arguments = _arguments_class()(**values)
        if (compiler := arguments.torch_compile and arguments.torch_compile_backend) not in (None, False, "inductor"):
            torch._dynamo.lookup_backend(compiler)
        optimizer = _build_optimizer(arguments, torch.nn.Linear(2, 2)) if builds_optimizer else None
        _build_schedule(arguments, optimizer)
    except REFUSALS as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _build_optimizer(arguments: TrainingArguments, model: Any) -> Any:
    from transformers import Trainer

    name: str = getattr(arguments.optim, "value", arguments.optim)
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (TypeError, ValueError):
        if name.startswith(NEEDS_THE_MODEL):
            return None
        raise
    return cls([{"params": list(model.parameters()), "weight_decay": arguments.weight_decay}], **options)


def optimizer_state_bytes(values: Mapping[str, Any], *, partitions: bool) -> float:
    """Return the bytes of optimizer states for each trained parameter: those after a step on a large one.

    Args:
        values: keyword arguments of `TrainingArguments`, as `check_training_flags` accepted them.
        partitions: DeepSpeed hands the optimizer flat parameters, of which none has rows and columns.
    """
    import torch

    values = {**values, "use_cpu": True, "tf32": None, "deepspeed": None, "save_on_each_node": False}
    model = torch.nn.Linear(LARGE, LARGE, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(LARGE**2 if partitions else (LARGE, LARGE)))
    optimizer = _build_optimizer(_arguments_class()(**values), model)
    if optimizer is None:
        return ADAM_BYTES
    model.weight.grad = torch.zeros_like(model.weight)
    if hasattr(optimizer, "train"):  # schedule-free
        optimizer.train()
    optimizer.step()
    tensors = [each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each)]
    return sum(tensor.nbytes for tensor in tensors) / model.weight.numel()


def _build_schedule(arguments: TrainingArguments, optimizer: Any) -> None:
    import torch
    from transformers import get_scheduler

    options: Any = arguments.lr_scheduler_kwargs
    name: str = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    if options and name in IGNORES_OPTIONS:
        raise ValueError(f"the schedule {name} takes no options")
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    steps = arguments.max_steps if arguments.max_steps > 0 else STEPS
    get_scheduler(
        name,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )


@cache
def _arguments_class() -> Any:
    """`TrainingArguments` without devices."""
    import torch
    from transformers import TrainingArguments

    class DevicelessArguments(TrainingArguments):
        _setup_devices = property(lambda self: torch.device("cpu"))
        _n_gpu, distributed_state = 0, None

    return DevicelessArguments
