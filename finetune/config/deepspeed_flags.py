"""What the command line and a DeepSpeed JSON both decide: each value is filled from the flag, or compared with it.

Precision, batch sizes, clipping, the optimizer and its hyperparameters, the schedule. A contradiction is a fault with
both values. transformers computes the schedule: a `scheduler` section says the same as the flags, or is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.config.deepspeed_optimizers import TESTED_WITH_ZERO, optimizer_options
from finetune.config.deepspeed_schema import section_of, unknown_key
from finetune.config.hardware import Precision

AUTO = "auto"
# DeepSpeed's schedules -> `--lr_scheduler_type`. Its others have rates of their own, which no flag decides.
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
# Optimizers that both can name, by their type in lower case -> the values of `--optim`.
ADAMW = ("adamw_torch", "adamw_torch_fused")
OPTIM = {"adam": ADAMW, "adamw": ADAMW, "adagrad": ("adagrad",), "sgd": ("sgd",), "rmsprop": ("rmsprop",)}
MANY = 16  # micro-batches whose gradients lose digits when they are summed in bf16
# `optimizer.params` -> the flags that decide it.
HYPERPARAMETERS = {
    "lr": ("learning_rate",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("weight_decay",),
}


@dataclass(frozen=True)
class DeepSpeedFlags:
    """The plain values a config is checked against, under their flag names; `given` are those the user gave."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    precision: Precision
    precision_was_replaced: bool = False
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    max_steps: int = -1
    given: Mapping[str, Any] = field(default_factory=dict)


def resolve_precision(config: dict[str, Any], command: DeepSpeedFlags, faults: list[str], notes: list[str]) -> None:
    """Switch `bf16` and `fp16` as the run computes."""
    for precision in ("bf16", "fp16"):
        wanted = command.precision == precision
        section = config.get(precision)
        if section is None and wanted:
            config[precision] = {"enabled": True}
        elif isinstance(section, dict):
            value = section.get("enabled", False)
            if value in (AUTO, wanted):
                section["enabled"] = wanted
            elif value is True and command.precision_was_replaced:
                section["enabled"] = False
                notes.append(f"{precision}.enabled is off for the same reason as the flag")
            else:
                fix = f'--{precision} {value}, or "{precision}": {{"enabled": "auto"}} there'
                faults.append(
                    f"{precision}.enabled is {json.dumps(value)}, but this run computes in "
                    f"{command.precision}: give {fix}"
                )


def resolve_accumulation(config: dict[str, Any], command: DeepSpeedFlags, stage: int, notes: list[str]) -> None:
    """Advise float32 sums where gradients of many micro-batches are added in bf16, which has 8 bits of mantissa."""
    given = (config.get("data_types") or {}).get("grad_accum_dtype")
    if command.precision == "bf16" and stage >= 2 and not given and command.gradient_accumulation_steps >= MANY:
        notes.append(
            f"gradients of {command.gradient_accumulation_steps} micro-batches are summed in bf16; "
            '"data_types": {"grad_accum_dtype": "fp32"} sums them in float32, for 2 more bytes a trained parameter'
        )


def resolve_schedule(
    config: dict[str, Any], command: DeepSpeedFlags, faults: list[str], notes: list[str]
) -> str | None:
    """Take the `scheduler` section out: transformers computes the schedule, and no flag may say another.

    Returns:
        The `--lr_scheduler_type` that the section means; None without a section.
    """
    section = config.pop("scheduler", None)
    if section is None:
        return None
    kind, params = section.get("type"), section.get("params") or {}
    same = SCHEDULES.get(kind) if isinstance(kind, str) else None
    if same is None:
        faults.append(
            f"scheduler.type is {json.dumps(kind)}, which no --lr_scheduler_type means, and that is "
            f"{command.lr_scheduler_type}: leave the section out, or write one of {', '.join(SCHEDULES)}"
        )
        return None
    if command.lr_scheduler_type != same and "lr_scheduler_type" in command.given:
        faults.append(
            f'scheduler.type is "{kind}", which is --lr_scheduler_type {same}, but --lr_scheduler_type is '
            f"{command.lr_scheduler_type}: leave the section out, or give --lr_scheduler_type {same}"
        )
    start = f"--lr_scheduler_type {same} "
    steps = f"--max_steps is {command.max_steps}" if command.max_steps > 0 else "the number of steps follows from data"
    decided = {
        "warmup_max_lr": (command.learning_rate, f"--learning_rate is {command.learning_rate}"),
        "warmup_num_steps": (command.warmup_steps, f"--warmup_steps is {command.warmup_steps:g}"),
        "total_num_steps": (command.max_steps, steps),
        "warmup_type": ("linear", start + "has a linear warm-up"),
        "warmup_min_lr": (0, start + "starts at 0"),
        "warmup_min_ratio": (0, start + "starts at 0"),
        "cos_min_ratio": (0, start + "ends at 0"),
        "last_batch_iteration": (-1, "a checkpoint decides where a run resumes"),
    }
    for key, value in params.items():
        if key not in decided:
            faults.append(unknown_key(("scheduler", "params", key), decided))
        elif value != AUTO and _as_number(value) != _as_number(decided[key][0]):
            faults.append(
                f"scheduler.params.{key} is {json.dumps(value)}, but {decided[key][1]}: "
                'write "auto" there, or leave the section out'
            )
    warmup = "" if "warmup_type" in params else ", with a linear warm-up where DeepSpeed's default is logarithmic"
    notes.append(f"scheduler {kind} is --lr_scheduler_type {same}: transformers computes it{warmup}")
    return same


def resolve_optimizer(
    config: dict[str, Any], command: DeepSpeedFlags, stage: int, *, use_cpu: bool, faults: list[str], notes: list[str]
) -> None:
    """Check the `optimizer` section, and leave to `resolve_values` what it does not say of the hyperparameters."""
    section, optim = config.get("optimizer"), command.given.get("optim")
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    offloads = offload.get("device", "none") != "none"
    if section is None:
        replaces = offloads and config.get("zero_force_ds_cpu_optimizer") is not False  # in accelerate
        if replaces and optim not in (None, *ADAMW, "adagrad"):
            faults.append(
                f"zero_optimization.offload_optimizer is {json.dumps(offload)}, for which accelerate takes DeepSpeed's "
                f"CPU Adam, but --optim is {optim}: leave one of them out"
            )
        if str(optim).startswith("schedule_free"):
            faults.append(f"--optim {optim}: DeepSpeed never saves the weights that it averages: leave one of them out")
        return
    kind, params = section.get("type"), section.get("params") or {}
    section["params"] = params
    where = f"optimizer.type is {json.dumps(kind)}"
    try:
        options = optimizer_options(kind, params, offloads=offloads, use_cpu=use_cpu)
    except ValueError as error:
        faults.append(f"{where}: {error}")
        return
    faults += [unknown_key(("optimizer", "params", key), options) for key in params if key not in options]
    for key, flags in HYPERPARAMETERS.items():
        if key in options:
            params.setdefault(key, AUTO)
        else:
            faults += [
                f"{where}, which has no {key}, but --{flag} is {command.given[flag]}: leave one of them out"
                for flag in flags
                if flag in command.given
            ]
    name = kind.lower()
    is_plain_adam = name == "adam" and params.get("adam_w_mode") is False
    if optim is not None and (is_plain_adam or optim not in OPTIM.get(name, ())):
        faults.append(f"{where}, but --optim is {optim}: leave one of them out")
    if stage > 0 and name not in TESTED_WITH_ZERO and config.get("zero_allow_untested_optimizer") is not True:
        faults.append(f'{where}: DeepSpeed partitions it only with "zero_allow_untested_optimizer": true')
    if name not in ("adam", "adamw"):
        first = "; torch compiles it in the first step, for minutes on a CPU" if name == "muon" else ""
        notes.append(f"the optimizer is DeepSpeed's {kind}{first}")


def resolve_values(config: dict[str, Any], command: DeepSpeedFlags, world_size: int, faults: list[str]) -> None:
    """Fill or compare the batch sizes, the clipping, and the hyperparameters of the optimizer."""
    micro, accumulation = command.per_device_train_batch_size, command.gradient_accumulation_steps
    decided = [
        ("train_micro_batch_size_per_gpu", micro, "--per_device_train_batch_size"),
        ("gradient_accumulation_steps", accumulation, "--gradient_accumulation_steps"),
        ("gradient_clipping", command.max_grad_norm, "--max_grad_norm"),
        ("optimizer.params.lr", command.learning_rate, "--learning_rate"),
        ("optimizer.params.betas", [command.adam_beta1, command.adam_beta2], "--adam_beta1, --adam_beta2"),
        ("optimizer.params.eps", command.adam_epsilon, "--adam_epsilon"),
        ("optimizer.params.weight_decay", command.weight_decay, "--weight_decay"),
    ]
    for key, value, flag in decided:
        _fill_or_compare(config, key, value, f"{flag} is {json.dumps(value)}", f"or give {flag} its value", faults)
    product = (
        f"{micro} per device x {accumulation} accumulated x {world_size} ranks is {micro * accumulation * world_size}"
    )
    _fill_or_compare(
        config, "train_batch_size", micro * accumulation * world_size, product, "or change one of them", faults
    )


def _fill_or_compare(config: dict[str, Any], key: str, value: Any, other: str, remedy: str, faults: list[str]) -> None:
    path = tuple(key.split("."))
    node, last = section_of(config, path), path[-1]
    if node is None or (last not in node and "." in key):
        return
    if node.get(last, AUTO) == AUTO:
        node[last] = value
    elif _as_number(node[last]) != _as_number(value):
        faults.append(f'{key} is {json.dumps(node[last])}, but {other}: write "auto" there, {remedy}')
    else:
        node[last] = value  # "8" becomes 8: DeepSpeed compares without converting


def _as_number(value: Any) -> Any:
    """`"8"`, 8 and 8.0 are one value; lists are compared element by element."""
    if isinstance(value, list):
        return [_as_number(item) for item in value]
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value
