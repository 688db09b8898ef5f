"""Fill a DeepSpeed config from the command line and the ranks, and collect what contradicts them.

Precision, batch sizes, clipping, the optimizer and its hyperparameters, the schedule, the options of ZeRO. A
contradiction is a fault with both values and the fix. transformers computes the schedule: a `scheduler` section says
the same as the flags, or is refused.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.config.deepspeed_optimizers import TESTED_WITH_ZERO, offload_devices, optimizer_options, takes_cpu_adam
from finetune.config.deepspeed_schema import remove_key, schema_faults, section_faults, section_of, unknown_key
from finetune.config.hardware import Precision

AUTO = "auto"
STAGES = (0, 1, 2, 3)
# Filled by transformers once the model's hidden size is known.
LEFT_TO_TRANSFORMERS = {
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
}
NEEDS_CUDA = ("zero_quantized_weights", "zero_quantized_gradients")
# DeepSpeed accepts these keys at every stage and ignores them below stage 3; with them, the values that mean "off".
STAGE_3_ONLY = {"zero_hpz_partition_size": 1} | dict.fromkeys(NEEDS_CUDA, False)
GATHERS = "stage3_gather_16bit_weights_on_model_save"
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


@dataclass
class DeepSpeedResolver:
    """A config while it is resolved, with the faults and notes so far."""

    config: dict[str, Any]
    command: DeepSpeedFlags
    world_size: int
    local_world_size: int  # ranks on this host
    use_cpu: bool
    sequence_parallel_size: int
    stage: int = 0
    lr_scheduler_type: str | None = None  # that a `scheduler` section means
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def resolve(self, *, imports_deepspeed: bool) -> None:
        """Resolve the whole config in place; with faults in its outline, nothing but these is looked at."""
        self.resolve_stage()
        if self.faults:
            return
        self.compare_sharing()
        for key, text in schema_faults(self.config, imports_deepspeed=imports_deepspeed):
            self.faults.append(text)
            remove_key(self.config, key)
        self.resolve_precision()
        self.resolve_schedule()
        self.resolve_optimizer()
        self.resolve_values()
        self.resolve_accumulation()
        self.resolve_zero()
        self.check_quantized_gradients()
        self.faults += [*self.leftover_autos(self.config)]
        # DeepSpeed's own timer lets each micro-batch on a GPU wait for the one before it; metrics.jsonl has the rates.
        self.config.setdefault("timers", {"throughput": {"enabled": False}})
        if any((self.config.get("activation_checkpointing") or {}).values()):
            self.notes.append(
                "the section activation_checkpointing has no effect: --activation_checkpointing True decides"
            )
        if self.sequence_parallel_size > 1:
            self.config["sequence_parallel_size"] = self.sequence_parallel_size
            self.config.pop("train_batch_size", None)  # transformers and DeepSpeed disagree on its meaning here
            self.config["zero_optimization"]["reduce_scatter"] = True  # see SupervisedTrainer._ranks_averaged_over

    def resolve_stage(self) -> None:
        """Read the stage, once the sections are objects."""
        self.faults += section_faults(self.config)
        stage = 0 if self.faults else self.config.get("zero_optimization", {}).get("stage", 0)
        if isinstance(stage, bool) or stage not in STAGES:
            self.faults.append(f"zero_optimization.stage is {json.dumps(stage)}: expected 0, 1, 2 or 3")
        else:
            self.stage = stage

    def compare_sharing(self) -> None:
        """Compare the ranks that share a conversation."""
        value, size = self.config.pop("sequence_parallel_size", AUTO), self.sequence_parallel_size
        if value not in (AUTO, size):
            self.faults.append(
                f"sequence_parallel_size is {json.dumps(value)}, but --sequence_parallel_size is {size}: leave the key "
                "out"
            )

    def resolve_precision(self) -> None:
        """Switch `bf16` and `fp16` as the run computes."""
        for precision in ("bf16", "fp16"):
            wanted, section = self.command.precision == precision, self.config.get(precision)
            if section is None and wanted:
                self.config[precision] = {"enabled": True}
            elif isinstance(section, dict):
                value = section.get("enabled", False)
                if value in (AUTO, wanted):
                    section["enabled"] = wanted
                elif value is True and self.command.precision_was_replaced:
                    section["enabled"] = False
                    self.notes.append(f"{precision}.enabled is off for the same reason as the flag")
                else:
                    self.faults.append(
                        f"{precision}.enabled is {json.dumps(value)}, but this run computes in "
                        f'{self.command.precision}: give --{precision} {value}, or "{precision}": '
                        '{"enabled": "auto"} there'
                    )

    def resolve_schedule(self) -> None:
        """Take the `scheduler` section out: transformers computes the schedule, and no flag may say another."""
        section, command = self.config.pop("scheduler", None), self.command
        if section is None:
            return
        kind, params = section.get("type"), section.get("params") or {}
        same = SCHEDULES.get(kind) if isinstance(kind, str) else None
        if same is None:
            self.faults.append(
                f"scheduler.type is {json.dumps(kind)}, which no --lr_scheduler_type means, and that is "
                f"{command.lr_scheduler_type}: leave the section out, or write one of {', '.join(SCHEDULES)}"
            )
            return
        if command.lr_scheduler_type != same and "lr_scheduler_type" in command.given:
            self.faults.append(
                f'scheduler.type is "{kind}", which is --lr_scheduler_type {same}, but --lr_scheduler_type is '
                f"{command.lr_scheduler_type}: leave the section out, or give --lr_scheduler_type {same}"
            )
        decided = self._decided_of_schedule(f"--lr_scheduler_type {same} ")
        for key, value in params.items():
            if key not in decided:
                self.faults.append(unknown_key(("scheduler", "params", key), decided))
            elif value != AUTO and _as_number(value) != _as_number(decided[key][0]):
                self.faults.append(
                    f"scheduler.params.{key} is {json.dumps(value)}, but {decided[key][1]}: "
                    'write "auto" there, or leave the section out'
                )
        warmup = "" if "warmup_type" in params else ", with a linear warm-up where DeepSpeed's default is logarithmic"
        self.notes.append(f"scheduler {kind} is --lr_scheduler_type {same}: transformers computes it{warmup}")
        self.lr_scheduler_type = same

    def _decided_of_schedule(self, start: str) -> dict[str, tuple[Any, str]]:
        """Return the values of `scheduler.params`, each with what decides it; `start` begins with the schedule."""
        rate, warmup, most = self.command.learning_rate, self.command.warmup_steps, self.command.max_steps
        steps = f"--max_steps is {most}" if most > 0 else "the number of steps follows from data"
        return {
            "warmup_max_lr": (rate, f"--learning_rate is {rate}"),
            "warmup_num_steps": (warmup, f"--warmup_steps is {warmup:g}"),
            "total_num_steps": (most, steps),
            "warmup_type": ("linear", start + "has a linear warm-up"),
            "warmup_min_lr": (0, start + "starts at 0"),
            "warmup_min_ratio": (0, start + "starts at 0"),
            "cos_min_ratio": (0, start + "ends at 0"),
            "last_batch_iteration": (-1, "a checkpoint decides where a run resumes"),
        }

    def resolve_optimizer(self) -> None:
        """Check the `optimizer` section, and leave to `resolve_values` what it does not say of the hyperparameters."""
        section, given = self.config.get("optimizer"), self.command.given
        optim = given.get("optim")
        if section is None:
            self._check_optim_without_section(optim)
            return
        kind, params = section.get("type"), section.get("params") or {}
        section["params"] = params
        where = f"optimizer.type is {json.dumps(kind)}"
        offloads = offload_devices(self.config)["offload_optimizer"] != "none"
        try:
            options = optimizer_options(kind, params, offloads=offloads, use_cpu=self.use_cpu)
        except ValueError as error:
            self.faults.append(f"{where}: {error}")
            return
        self.faults += [unknown_key(("optimizer", "params", key), options) for key in params if key not in options]
        for key, flags in HYPERPARAMETERS.items():
            if key in options:
                params.setdefault(key, AUTO)
                continue
            for flag in filter(given.__contains__, flags):
                self.faults.append(f"{where}, which has no {key}, but --{flag} is {given[flag]}: leave one of them out")
        name = kind.lower()
        is_plain_adam = name == "adam" and params.get("adam_w_mode") is False
        if optim is not None and (is_plain_adam or optim not in OPTIM.get(name, ())):
            self.faults.append(f"{where}, but --optim is {optim}: leave one of them out")
        is_allowed = name in TESTED_WITH_ZERO or self.config.get("zero_allow_untested_optimizer") is True
        if self.stage > 0 and not is_allowed:
            self.faults.append(f'{where}: DeepSpeed partitions it only with "zero_allow_untested_optimizer": true')
        if name not in ("adam", "adamw"):
            first = "; torch compiles it in the first step, for minutes on a CPU" if name == "muon" else ""
            self.notes.append(f"the optimizer is DeepSpeed's {kind}{first}")

    def _check_optim_without_section(self, optim: Any) -> None:
        if takes_cpu_adam(self.config) and optim not in (None, *ADAMW, "adagrad"):
            offload = self.config["zero_optimization"]["offload_optimizer"]
            self.faults.append(
                f"zero_optimization.offload_optimizer is {json.dumps(offload)}, for which accelerate takes DeepSpeed's "
                f"CPU Adam, but --optim is {optim}: leave one of them out"
            )
        if str(optim).startswith("schedule_free"):
            self.faults.append(
                f"--optim {optim}: DeepSpeed never saves the weights that it averages: leave one of them out"
            )

    def resolve_values(self) -> None:
        """Fill or compare the batch sizes, the clipping, and the hyperparameters of the optimizer."""
        command, ranks = self.command, self.world_size // self.sequence_parallel_size
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
            self._fill_or_compare(key, value, f"{flag} is {json.dumps(value)}", f"or give {flag} its value")
        size = micro * accumulation * ranks
        product = f"{micro} per device x {accumulation} accumulated x {ranks} ranks is {size}"
        self._fill_or_compare("train_batch_size", size, product, "or change one of them")

    def _fill_or_compare(self, key: str, value: Any, other: str, remedy: str) -> None:
        path = tuple(key.split("."))
        node, last = section_of(self.config, path), path[-1]
        if node is None or (last not in node and "." in key):
            return
        if node.get(last, AUTO) != AUTO and _as_number(node[last]) != _as_number(value):
            self.faults.append(f'{key} is {json.dumps(node[last])}, but {other}: write "auto" there, {remedy}')
        else:
            node[last] = value  # "8" becomes 8: DeepSpeed compares without converting

    def resolve_accumulation(self) -> None:
        """Advise float32 sums where gradients of many micro-batches are added in bf16, which has 8 bits of mantissa."""
        given = (self.config.get("data_types") or {}).get("grad_accum_dtype")
        count = self.command.gradient_accumulation_steps
        if self.command.precision == "bf16" and self.stage >= 2 and not given and count >= MANY:
            self.notes.append(
                f"gradients of {count} micro-batches are summed in bf16; "
                '"data_types": {"grad_accum_dtype": "fp32"} sums them in float32, for 2 more bytes a trained parameter'
            )

    def resolve_zero(self) -> None:
        """Set what saving needs, switch off what a CPU cannot do, and check what needs another stage or a disk."""
        zero = self.config.setdefault("zero_optimization", {"stage": self.stage})
        if self.stage == 3 and zero.get(GATHERS) is not True:
            zero[GATHERS] = True
            self.notes.append(f"{GATHERS} is switched on: without it no model is saved")
        self.resolve_hpz(zero)
        for name in NEEDS_CUDA if self.use_cpu else ():
            if zero.get(name):
                zero[name] = False
                self.notes.append(f"{name} is off: its kernels need a GPU")
        devices = offload_devices(self.config)
        needed: list[tuple[str, tuple[int, ...]]] = [
            (key, (3,)) for key, off in STAGE_3_ONLY.items() if zero.get(key, off) != off
        ]
        needed += [("offload_param", (3,))] * (devices["offload_param"] != "none")
        if devices["offload_optimizer"] != "none":  # below stage 3 DeepSpeed offloads to host memory instead of a disk
            is_nvme = devices["offload_optimizer"] == "nvme"
            needed.append(("offload_optimizer to NVMe", (3,)) if is_nvme else ("offload_optimizer", (1, 2, 3)))
        for what, stages in needed:
            if self.stage not in stages:
                expected = " or ".join(map(str, stages))
                self.faults.append(f"{what} needs ZeRO stage {expected}, but zero_optimization.stage is {self.stage}")
        for key in [key for key, device in devices.items() if device == "nvme"]:
            nvme = zero[key].get("nvme_path")
            if not (isinstance(nvme, str) and nvme and os.path.isdir(nvme)):
                self.faults.append(
                    f"{key}.nvme_path is {json.dumps(nvme)}, which is no folder on this host: "
                    "copy the config and name a folder on a local NVMe disk"
                )

    def resolve_hpz(self, zero: dict[str, Any]) -> None:
        """ZeRO++ keeps a second copy of the weights in each group of `zero_hpz_partition_size` ranks, one host each."""
        size, ranks, here = zero.get("zero_hpz_partition_size"), self.world_size, self.local_world_size
        if size == AUTO:
            zero["zero_hpz_partition_size"] = here
            if ranks % here:
                self.faults.append(
                    f"zero_hpz_partition_size is the {here} ranks of this host, which do not divide the {ranks} ranks: "
                    "give every host as many, or leave the key out"
                )
        elif size is not None and (type(size) is not int or size < 1 or ranks % size):
            self.faults.append(
                f"zero_hpz_partition_size is {json.dumps(size)}, which does not divide the {ranks} ranks: "
                f'write "auto" (the ranks of one host, here {here})'
            )

    def check_quantized_gradients(self) -> None:
        """Refuse 4-bit gradients in other precisions than fp16: DeepSpeed's kernel reads the bits as fp16 (0.19.8)."""
        precision = self.command.precision
        kinds = (precision, self.config.get("communication_data_type") or precision)
        others = [kind for kind in kinds if kind != "fp16"]
        if self.config["zero_optimization"].get("zero_quantized_gradients") and others:
            self.faults.append(
                f"zero_quantized_gradients is true, but gradients are {others[0]}, which DeepSpeed's kernel reads "
                "as fp16: set it to false"
            )

    def leftover_autos(self, config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        """Yield a fault for each `"auto"` that nothing decides, unless a fault is about this key already."""
        for key, value in config.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                yield from self.leftover_autos(value, f"{name}.")
            elif value == AUTO and name not in LEFT_TO_TRANSFORMERS:
                if not any(fault.startswith((f"{name} is ", f'"{name}" is ')) for fault in self.faults):
                    yield f'{name} is "auto", but nothing on the command line decides it: give a value'


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
