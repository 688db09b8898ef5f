"""ZeRO-3: modules whose parameters are gathered together, and a partitioned model without DeepSpeed's engine."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from finetune.models.module_kinds import ROUTED_EXPERTS, ModuleKinds, loss_module

if TYPE_CHECKING:
    import torch


def set_leaf_modules(model: Any, kinds: ModuleKinds, empty: Any) -> None:
    """Let DeepSpeed gather what `leaf_modules` names as a whole, if the model is partitioned."""
    if is_partitioned(model):
        gather_as_a_whole([model.get_submodule(name) for name in leaf_modules(model, kinds, empty)])


def is_partitioned(model: Any) -> bool:
    """Whether each rank holds a part of every parameter (ZeRO-3)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def gather_as_a_whole(modules: Sequence[Any]) -> None:
    """Let DeepSpeed gather all parameters inside of each module when it is called, and reduce their gradients together.

    It does so behind the module's backward pass, which torch sees end at the positional inputs with a gradient; without
    one that would be before any gradient is there, which would be lost. (DeepSpeed 0.19.8)
    """
    import torch
    from deepspeed.utils import set_z3_leaf_module

    def first_has_gradient(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        name = [*inspect.signature(type(module).forward).parameters][1]
        if not args and name in kwargs:
            args = (kwargs.pop(name),)
        first = args[0] if args else None
        if torch.is_tensor(first) and torch.is_grad_enabled() and first.is_floating_point() and not first.requires_grad:
            args = (first.detach().requires_grad_(), *args[1:])
        return args, kwargs

    for module in modules:
        set_z3_leaf_module(module, True)
        module.register_forward_pre_hook(first_has_gradient, with_kwargs=True)


def leaf_modules(model: Any, kinds: ModuleKinds, empty: Any) -> list[str]:
    """Return the names of the modules whose parameters are needed together: experts, and some that peft wraps.

    Each token takes other experts, so that their order is no guide to prefetching, and a rank may need one that
    another does not. `peft.tuners.lora.ParamWrapper` reads the weights of modules that it does not call. A head with
    LoRA runs once for each chunk of the loss, of which ranks have different numbers.

    Args:
        model: maybe with an adapter.
        empty: the same model without one.
    """
    prefix = "base_model.model." if hasattr(model, "peft_config") else ""
    names: list[str] = []
    head: Any = loss_module(model)
    for name, module in model.named_modules():
        is_wrapper = type(module).__name__ == "ParamWrapper" and not name.endswith(".base_layer")
        if is_wrapper or (module is head and any(module.children())):
            names.append(name)
    for name, kind in kinds.by_module.items():
        if kind == ROUTED_EXPERTS:
            names.append(prefix + _called_module(empty, name))
    return [name for name in dict.fromkeys(names) if not any(name.startswith(f"{outer}.") for outer in names)]


def _called_module(model: Any, name: str) -> str:
    """Return the innermost module that the code calls around the experts that a weight belongs to."""
    parts = name.split(".")
    place = next((number for number, part in enumerate(parts) if part.endswith("experts")), len(parts) - 1)
    container = ".".join(parts[: place + 1])
    while not _is_called(model.get_submodule(container)):
        container = container.rpartition(".")[0]
    return container


def _is_called(module: Any) -> bool:
    """Whether a module's `forward` is used: not that of a list, nor one that refuses (JetMoe's attention experts)."""
    import torch

    if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
        return False
    return "raise NotImplementedError" not in inspect.getsource(type(module).forward)


@contextmanager
def gather_per_module(model: Any) -> Iterator[None]:
    """Let a model partitioned by ZeRO-3 run before DeepSpeed's engine exists.

    Modules gather their own parameters and those of their children, which some code reads without calling the child.
    """
    from deepspeed.utils import z3_leaf_module

    leaves = [module for module in model.modules() if z3_leaf_module(module)]
    inside = {id(part) for leaf in leaves for part in leaf.modules()} - {id(leaf) for leaf in leaves}
    partitioned = [
        (module, parameters)
        for module in model.modules()
        if id(module) not in inside
        if (
            parameters := [
                weight
                for part in (module.modules() if z3_leaf_module(module) else (module, *module.children()))
                for weight in part.parameters(recurse=False)
                if hasattr(weight, "ds_id")
            ]
        )
    ]
    present: set[int] = set()
    with ExitStack() as hooks:
        for module, parameters in partitioned:
            import deepspeed

            gathered = ExitStack()
            hooks.callback(gathered.close)  # after a module that failed

            def gather(*_: Any, parameters: list = parameters, gathered: ExitStack = gathered) -> None:
                absent = [weight for weight in parameters if id(weight) not in present]
                present.update(map(id, absent))
                gathered.callback(present.difference_update, set(map(id, absent)))
                gathered.enter_context(deepspeed.zero.GatheredParameters(absent))

            def release(*_: Any, gathered: ExitStack = gathered) -> None:
                gathered.close()

            hooks.callback(module.register_forward_pre_hook(gather).remove)
            hooks.callback(module.register_forward_hook(release).remove)
        yield


@contextmanager
def gathered(parameters: Iterable[Any], *, changes: bool = False) -> Iterator[None]:
    """Gather those of the parameters that are partitioned (ZeRO-3) on every rank inside the block. All ranks.

    Args:
        changes: the block changes them; all ranks keep what rank 0 has at its end.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if changes else None):
        yield


def values_here(parameter: Any) -> torch.Tensor:
    """Return the values of a parameter; of a partition (ZeRO-3) without its padding, nothing while it is on NVMe."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.data
    if partition.status.name != "AVAILABLE":
        return partition.data[:0]
    begin = parameter.ds_zero_partition_rank * partition.ds_numel
    return partition.data.flatten()[: max(0, parameter.ds_numel - begin)]
