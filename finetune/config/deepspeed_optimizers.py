"""The optimizers of a DeepSpeed config: which can be built here, what their `params` may hold, what is compiled.

The sources of DeepSpeed and torch are read, because importing them takes seconds.
"""

import ast
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from finetune.utils.options import declaration, source_folder

# The optimizers that DeepSpeed builds by type: module and class below `deepspeed/ops`, on the GPU and offloaded.
DEEPSPEED_CLASSES = {
    "adam": ("adam/fused_adam.FusedAdam", "adam/cpu_adam.DeepSpeedCPUAdam"),
    "adamw": ("adam/fused_adam.FusedAdam", "adam/cpu_adam.DeepSpeedCPUAdam"),
    "lion": ("lion/fused_lion.FusedLion", "lion/cpu_lion.DeepSpeedCPULion"),
    "lamb": ("lamb/fused_lamb.FusedLamb", "lamb/fused_lamb.FusedLamb"),
    "adagrad": ("", "adagrad/cpu_adagrad.DeepSpeedCPUAdagrad"),
}
NEEDS_GPU = ("lion/fused_lion.FusedLion", "lamb/fused_lamb.FusedLamb")
ADAM = ("adam", "adamw")
# Those that DeepSpeed partitions without `zero_allow_untested_optimizer`.
TESTED_WITH_ZERO = ("adam", "adamw", "adagrad", "lion", "muon")


def optimizer_options(kind: Any, params: Mapping[str, Any], *, offloads: bool, use_cpu: bool) -> set[str]:
    """Return the names that `optimizer.params` may hold, as the sources of DeepSpeed and torch declare them.

    Raises:
        ValueError: DeepSpeed cannot build this optimizer here.
    """
    if not isinstance(kind, str):
        raise ValueError("expected a name, such as AdamW")
    name = kind.lower()
    if name == "muon":
        return {"lr", "muon_lr", "adam_lr", "momentum", "ns_method", "betas", "eps", "weight_decay", "adam_w_mode"}
    is_adam = name in ADAM
    path = _deepspeed_class(name, params, offloads)
    if is_adam and not path:
        kind = "AdamW"
    if use_cpu and path in NEEDS_GPU:
        raise ValueError("its kernels need a GPU")
    library, folder = ("deepspeed", "ops") if path else ("torch", "optim")
    module, _, cls_name = (path or _torch_optimizer("Adagrad" if name == "adagrad" else kind)).partition(".")
    cls = declaration(library, f"{folder}/{module}.py", cls_name)
    [init] = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    options = {argument.arg for argument in [*init.args.args[2:], *init.args.kwonlyargs]}
    return options | ({"adam_w_mode", "torch_adam", "fp32_optimizer_states"} if is_adam else set())


def offload_devices(config: Mapping[str, Any]) -> dict[str, str]:
    """Return where a config offloads optimizer states and parameters to, by key: none, cpu or nvme."""
    zero = config.get("zero_optimization", {})
    return {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}


def takes_cpu_adam(config: Mapping[str, Any]) -> bool:
    """Return whether accelerate takes DeepSpeed's CPU Adam where there is no `optimizer` section."""
    offloads = offload_devices(config)["offload_optimizer"] != "none"
    return offloads and config.get("zero_force_ds_cpu_optimizer") is not False


def _deepspeed_class(name: str, params: Mapping[str, Any], offloads: bool) -> str:
    """Return the entry of `DEEPSPEED_CLASSES` for an optimizer; empty if torch's class is taken."""
    return "" if name in ADAM and params.get("torch_adam") else DEEPSPEED_CLASSES.get(name, ("", ""))[offloads]


def operators_of(config: Mapping[str, Any] | None, *, use_cpu: bool) -> list[str]:
    """Return DeepSpeed's names of the operators that a run with this config compiles; none without DeepSpeed."""
    if config is None:
        return []
    zero, devices = config.get("zero_optimization", {}), offload_devices(config)
    optimizer = config.get("optimizer") or {"type": "AdamW" if takes_cpu_adam(config) else ""}
    path = _deepspeed_class(
        optimizer["type"].lower(), optimizer.get("params") or {}, devices["offload_optimizer"] != "none"
    )
    names = ["deepspeed_shm_comm"] if use_cpu else []
    names += [path.partition("/")[2].partition(".")[0]] if path else []
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
        names.append("quantizer")
    return names + (["async_io"] if "nvme" in devices.values() else [])


def _torch_optimizer(kind: str) -> str:
    """Return the module and class of an optimizer below `torch/optim`, or raise ValueError with the nearest name."""
    text = source_folder("torch").joinpath("optim/__init__.py").read_text(encoding="utf-8")
    modules = {
        cls_name: module for module, cls_name in re.findall(r"^from torch\.optim\.(\w+) import ([A-Z]\w+)", text, re.M)
    }
    del modules["Optimizer"]
    if kind in modules:
        return f"{modules[kind]}.{kind}"
    known = {name.lower(): name for name in ("AdamW", "Adam", "Lion", "Lamb", "Muon", *modules)}
    close = get_close_matches(kind.lower(), known, n=1, cutoff=0.7)
    remedy = f'did you mean "{known[close[0]]}"?' if close else f"expected one of {', '.join(known.values())}"
    raise ValueError(f"neither DeepSpeed nor torch.optim can build it: {remedy}")
