"""Resolve a command line for this hardware and number of ranks into a `RunConfig`."""

import os
from pathlib import Path
from typing import Any

from finetune.config.arguments import Arguments
from finetune.config.deepspeed_config import (
    DeepSpeedFlags,
    ResolvedDeepSpeedConfig,
    find_config,
    load_config,
    resolve_deepspeed_config,
)
from finetune.config.hardware import DetectedHardware, HardwareConfig, resolve_hardware
from finetune.config.optional_packages import check_liger, check_optimizer, check_quantization, check_trackers
from finetune.config.run_config import (
    ActivationCheckpointing,
    BatchConfig,
    CheckpointConfig,
    RankCounts,
    RunConfig,
    SavedStep,
    ScheduleConfig,
)
from finetune.run_dir import output_dir_lock
from finetune.utils.errors import ConfigError
from finetune.utils.options import one_of
from finetune.utils.user_files import has_type, parse_object

# Those of torch.utils.checkpoint after our two.
CHECKPOINTING = {"every_n_layers": int, **dict.fromkeys(("offload", "use_reentrant", "preserve_rng_state"), bool)}
GROUPS_ITSELF = ("galore", "apollo", "lomo", "adalomo", "muon", "dion")  # beginnings of names of --optim
# Recorded in checkpoints even where the user leaves them to their defaults, which transformers may change.
RECORDED_FLAGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def resolve_config(
    arguments: Arguments,
    detected: DetectedHardware,
    ranks: RankCounts,
    saved: SavedStep | None = None,
    *,
    imports_deepspeed: bool = True,
) -> RunConfig:
    """Resolve flags that depend on the hardware, the ranks, the DeepSpeed JSON and the checkpoint to resume from.

    Args:
        saved: given where that checkpoint is from another number of ranks: the step keeps its rows.
        imports_deepspeed: False takes no seconds, and leaves out what only DeepSpeed's own code can say of its JSON.
    """
    output_dir = arguments.output_dir
    check_flags(arguments, ranks.size)
    evaluation = evaluation_options(arguments)
    check_output_dir(arguments)
    hardware = resolve_hardware(
        detected,
        bf16=arguments.training.get("bf16"),
        fp16=bool(arguments.given("fp16")),
        tf32=arguments.given("tf32"),
        attn_implementation=arguments.model.attn_implementation,
    )
    check_liger(arguments, hardware)
    batch, batch_notes = resolve_batch(arguments, ranks.size, saved)
    deepspeed = _resolve_deepspeed(arguments, hardware, batch, ranks, imports_deepspeed)
    _check_rates(arguments, deepspeed)
    bits, stage = arguments.model.quantized_bits(), deepspeed.stage if deepspeed else None
    check_quantization(bits, f"--load_in_{bits}bit True", arguments.adapter, stage)
    if deepspeed is not None and saved is not None:
        deepspeed.config.setdefault("checkpoint", {})["load_universal"] = True
    checkpoint = CheckpointConfig(
        output_dir=output_dir,
        overwrite=arguments.run.overwrite_output_dir,
        keep=arguments.given("save_total_limit"),
        resume_from=arguments.resumes_from(),
        allow_inexact=arguments.run.allow_inexact_resume,
        any_world_size=arguments.run.resume_world_size == "any",
        verify_key=arguments.run.verify_key,
        world_size_changes=saved is not None,
    )
    notes = (*arguments.notes, *_saving_notes(arguments), *batch_notes, *hardware.notes)
    flags = arguments.flat()
    if saved is not None:
        flags["gradient_accumulation_steps"] = batch.accumulation
        if batch.tokens_per_device is None:
            flags["per_device_train_batch_size"] = batch.per_device_batch
    if deepspeed is not None and deepspeed.lr_scheduler_type:
        flags["lr_scheduler_type"] = deepspeed.lr_scheduler_type
    recorded = {**{name: arguments.given(name) for name in RECORDED_FLAGS}, **flags}
    return RunConfig(
        model=arguments.model,
        data=arguments.data,
        adapter=arguments.adapter,
        run=arguments.run,
        batch=batch,
        checkpoint=checkpoint,
        schedule=ScheduleConfig(**{name: arguments.given(name) for name in ScheduleConfig.__dataclass_fields__}),
        hardware=hardware,
        deepspeed=deepspeed,
        activation_checkpointing=activation_checkpointing(arguments),
        training={**_training_values(arguments, hardware, batch, deepspeed), **evaluation},
        flags=flags,
        resume_flags=recorded,
        held_out_schedule=_held_out_schedule(arguments),
        notes=(*notes, *(deepspeed.notes if deepspeed else ())),
    )


def check_output_dir(arguments: Arguments) -> None:
    """Check that the output folder is not the model's, and as `output_dir_lock.check_output_dir` does."""
    for source in filter(None, (arguments.model.model_name_or_path, arguments.model.adapter_name_or_path)):
        if arguments.output_dir.resolve() == Path(source).expanduser().resolve():
            raise ConfigError(f"--output_dir {arguments.output_dir}: is the folder of the model: choose another one")
    output_dir_lock.check_output_dir(
        arguments.output_dir, overwrite=arguments.run.overwrite_output_dir, resume=arguments.resumes_from() is not None
    )


def check_flags(arguments: Arguments, world_size: int | None = None) -> None:
    """Check what does not depend on the hardware, and needs no library.

    Args:
        world_size: None where it is not known yet.
    """
    report_to, deepspeed = (arguments.given(name) for name in ("report_to", "deepspeed"))
    evaluation_options(arguments)
    _check_sequence_parallel(arguments, world_size)
    if arguments.given("auto_find_batch_size"):
        raise ConfigError(
            "--auto_find_batch_size True: a step must keep its size; give --tokens_per_device_batch, or a smaller "
            "--per_device_train_batch_size with more --gradient_accumulation_steps"
        )
    check_trackers([report_to] if isinstance(report_to, str) else report_to or [])
    check_optimizer(str(arguments.given("optim")))
    bits = arguments.model.quantized_bits()
    check_quantization(bits, f"--load_in_{bits}bit True", arguments.adapter, None)
    if deepspeed:
        load_config(find_config(deepspeed))


def resolve_batch(
    arguments: Arguments, world_size: int, saved: SavedStep | None = None
) -> tuple[BatchConfig, list[str]]:
    """Resolve the batch flags; lines for the user where the step of a checkpoint is divided among other ranks."""
    flags, budget = arguments.batch, arguments.batch.tokens_per_device_batch
    size = arguments.given("per_device_train_batch_size") if budget is None else 1
    accumulation, notes = arguments.given("gradient_accumulation_steps"), []
    if saved is not None:
        groups, rest = divmod(world_size, flags.sequence_parallel_size)
        if rest or saved.step_rows % groups:
            raise ConfigError(
                f"--resume_world_size any: a step of {saved.step_rows} rows cannot be divided among {groups} ranks: "
                f"start as many as divide {saved.step_rows}"
            )
        share = saved.step_rows // groups
        size = next(rows for rows in range(min(size, share), 0, -1) if share % rows == 0)
        accumulation = share // size
        notes.append(
            f"a step stays {saved.step_rows} rows on {groups} ranks instead of {saved.world_size}: "
            f"--per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}"
        )
    data_seed, virtual = arguments.given("data_seed"), None
    if arguments.adapter.virtual_tokens():
        virtual = f"{arguments.adapter.kind()} tuning puts virtual tokens before each conversation"
    eval_size = arguments.training.get("per_device_eval_batch_size", arguments.given("per_device_train_batch_size"))
    batch = BatchConfig(
        batching=flags.batching,
        loss_weighting=flags.loss_weighting,
        per_device_batch=size,
        per_device_eval_batch=eval_size,
        accumulation=accumulation,
        tokens_per_device=budget,
        sequence_parallel_size=flags.sequence_parallel_size,
        world_size=world_size,
        model_max_length=arguments.data.model_max_length,
        sampling=arguments.given("train_sampling_strategy"),
        drop_last=arguments.given("dataloader_drop_last"),
        seed=arguments.given("seed"),
        data_seed=arguments.given("seed") if data_seed is None else data_seed,
        padding_reason=_padding_reason(arguments) or virtual,
        full_logits_reason=virtual,
    )
    return batch, notes


def _padding_reason(arguments: Arguments) -> str | None:
    attention = arguments.model.attn_implementation
    if arguments.given("neftune_noise_alpha") is not None:
        return "NEFTune scales its noise by the length of a row"
    if attention is not None and attention != "sdpa" and "flash" not in attention:
        return f"--attn_implementation {attention} supports no boundaries inside a row"
    return None


def evaluation_options(arguments: Arguments) -> dict[str, Any]:
    """Return what `TrainingArguments` is told about held-out conversations; nothing without any."""
    if not arguments.evaluates():
        needs = {
            "eval_strategy": arguments.given("eval_strategy") not in ("no", None),
            "load_best_model_at_end": arguments.given("load_best_model_at_end"),
            "early_stopping_patience": arguments.run.early_stopping_patience is not None,
            "save_strategy best": arguments.given("save_strategy") == "best",
        }
        for name in (name for name, given in needs.items() if given):
            raise ConfigError(f"--{name}: needs held-out conversations: give --eval_data_path or --validation_share")
        return {}
    metric = arguments.given("metric_for_best_model")
    if metric not in (None, "loss", "eval_loss"):
        raise ConfigError(f"--metric_for_best_model {metric}: expected eval_loss, the only one that is computed")
    return {
        "eval_strategy": arguments.training.get("eval_strategy", "epoch"),
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "prediction_loss_only": True,
    }


def _held_out_schedule(arguments: Arguments) -> str | None:
    if not arguments.evaluates():
        return None
    strategy, every = arguments.training.get("eval_strategy", "epoch"), arguments.given("eval_steps")
    return f"every {every:g} steps" if strategy == "steps" and every else f"by {strategy}"


def _training_values(
    arguments: Arguments, hardware: HardwareConfig, batch: BatchConfig, deepspeed: ResolvedDeepSpeedConfig | None
) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments`."""
    values = {
        **arguments.training,
        "output_dir": str(arguments.output_dir),
        "bf16": hardware.precision == "bf16",
        "fp16": hardware.precision == "fp16",
        "tf32": hardware.tf32,
        "use_cpu": hardware.use_cpu,
        "gradient_accumulation_steps": batch.accumulation,
        "per_device_train_batch_size": batch.deepspeed_batch,
        "deepspeed": deepspeed.config if deepspeed else None,
        **({"lr_scheduler_type": deepspeed.lr_scheduler_type} if deepspeed and deepspeed.lr_scheduler_type else {}),
        "save_total_limit": None,  # transformers would remove by name, before the new one is complete: see `Saver`
        "resume_from_checkpoint": None,
        "logging_nan_inf_filter": False,
    }
    if hardware.use_cpu:
        values["dataloader_pin_memory"] = False
    # Liger's fused loss would compute logits of its own; its norms, rotary embeddings and gates are wanted.
    liger = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    values["liger_kernel_config"] = parse_object(arguments.training.get("liger_kernel_config") or "") or liger
    return values


def _saving_notes(arguments: Arguments) -> list[str]:
    if arguments.given("save_strategy") == "no":
        return []
    notes, keep = [], arguments.given("save_total_limit")
    if arguments.given("save_only_model"):
        notes.append("--save_only_model True: checkpoints hold no optimizer state, and no run can resume from them")
    if keep and keep > 0 and not arguments.was_given("save_total_limit"):
        notes.append(f"the newest {keep} checkpoints are kept, older ones are removed: --save_total_limit 0 keeps all")
    return notes


def _check_sequence_parallel(arguments: Arguments, world_size: int | None) -> None:
    size = arguments.batch.sequence_parallel_size
    if size == 1:
        return
    faults = {
        "it needs DeepSpeed: give --deepspeed zero3": not arguments.given("deepspeed"),
        f"it does not divide the {world_size} ranks": world_size is not None and world_size % size,
        "ranks can only share flat or packed rows: leave out --batching padded": arguments.batch.batching == "padded",
    }
    if reasons := [reason for reason, applies in faults.items() if applies]:
        raise ConfigError(f"--sequence_parallel_size {size}: " + "; ".join(reasons))


def _check_rates(arguments: Arguments, deepspeed: ResolvedDeepSpeedConfig | None) -> None:
    """Check that the optimizer takes learning rates for groups of parameters, if flags give any."""
    optim = str(arguments.given("optim"))
    for name in ("embedding_learning_rate", "loraplus_lr_ratio"):
        if (value := getattr(arguments.adapter, name)) is None:
            continue
        if deepspeed is not None and {"optimizer", "scheduler"} & deepspeed.config.keys():
            raise ConfigError(
                f"--{name} {value:g}: the DeepSpeed JSON has an optimizer or scheduler section, which gives all "
                "parameters one rate: leave the section out"
            )
        if optim.startswith(GROUPS_ITSELF):
            raise ConfigError(f"--{name} {value:g}: --optim {optim} groups parameters in its own way: leave one out")


def _resolve_deepspeed(
    arguments: Arguments, hardware: HardwareConfig, batch: BatchConfig, ranks: RankCounts, imports_deepspeed: bool
) -> ResolvedDeepSpeedConfig | None:
    name = arguments.given("deepspeed")
    if not name:
        return None
    if hardware.use_cpu and imports_deepspeed:  # it would compute on a GPU that the run leaves alone
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    is_half = bool(arguments.given("bf16") or arguments.given("fp16"))
    derived: dict[str, Any] = {
        "per_device_train_batch_size": batch.deepspeed_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "precision": hardware.precision,
        "precision_was_replaced": is_half and hardware.precision == "float32",
        "given": arguments.given_flags(),
    }
    given = {flag: arguments.given(flag) for flag in DeepSpeedFlags.__dataclass_fields__ if flag not in derived}
    path = find_config(name)
    return resolve_deepspeed_config(
        path,
        load_config(path),
        DeepSpeedFlags(**given, **derived),
        world_size=ranks.size,
        local_world_size=ranks.local_size,
        use_cpu=hardware.use_cpu,
        sequence_parallel_size=batch.sequence_parallel_size,
        imports_deepspeed=imports_deepspeed,
    )


def activation_checkpointing(arguments: Arguments) -> ActivationCheckpointing:
    """Read `--activation_checkpointing` and its options, a JSON object."""
    given = arguments.given("activation_checkpointing_kwargs") or "{}"
    options = parse_object(given)
    known = options is not None and all(has_type(value, CHECKPOINTING.get(key)) for key, value in options.items())
    if options is None or not known or options.get("every_n_layers", 1) < 1:
        raise ConfigError(
            f'--activation_checkpointing_kwargs {given}: expected a JSON object such as {{"every_n_layers": 2}}: '
            f"every_n_layers is at least 1, {one_of([*CHECKPOINTING][1:])} true or false"
        )
    every, offload = options.get("every_n_layers", 1), options.get("offload", False)
    return ActivationCheckpointing(bool(arguments.given("activation_checkpointing")), every, offload)
