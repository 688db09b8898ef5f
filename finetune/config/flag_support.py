"""Flags of `transformers.TrainingArguments` that have no effect here, and get a note, and those that are refused.

A test knows what each of the others does, so that a new flag of transformers is not accepted without a decision.
"""

from collections.abc import Iterable, Iterator

from finetune.config.arguments import SECRETS, Arguments, default_of

WITHOUT_EFFECT = {
    "logging_nan_inf_filter": "a non-finite loss is always logged as that",
    "disable_tqdm": "the progress bar is drawn on terminals only",
    **dict.fromkeys(
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics".split(),
        "only the loss is computed on held-out conversations",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"), "held-out conversations are evaluated in the precision of training"
    ),
    "greater_is_better": "the best checkpoint is that with the lowest held-out loss",
    "save_on_each_node": "it is found out which hosts share --output_dir",
    "restore_callback_states_from_checkpoint": "checkpoints hold no states of callbacks",
    "dataloader_multiprocessing_context": "workers are forked",
    **dict.fromkeys(("remove_unused_columns", "label_names"), "batches hold exactly what the model needs"),
    "length_column_name": "lengths are those of the prepared examples",
    "ddp_backend": "NCCL connects GPUs, gloo CPUs",
    "do_eval": "--eval_data_path or --validation_share hold conversations out",
    "do_predict": "`finetune evaluate` evaluates a result",
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "`finetune push` uploads a result",
    ),
}
REFUSED = {
    "average_tokens_across_devices": "the loss is a mean over all supervised tokens of a step, whichever rank has them",
    "enable_jit_checkpoint": "a run that receives SIGTERM saves a checkpoint anyway",
    "ignore_data_skip": "a resumed run would train on rows of the first part again",
    "accelerator_config": "batches are not divided by accelerate",
    "parallelism_config": "--sequence_parallel_size and --deepspeed say how ranks share the work",
    "dataloader_in_order": "rows must be seen in the order that a resumed run repeats",
    "push_to_hub": "it would upload rows of the data, too: `finetune push OUTPUT REPO` uploads the result alone",
    **dict.fromkeys(("fsdp", "fsdp_config"), "--deepspeed zero3 partitions the parameters"),
}
ADAM_FLAGS = ("adam_beta1", "adam_beta2", "adam_epsilon")
ADAM_OPTIMIZERS = ("adam", "lion", "galore", "apollo")  # parts of the names of optimizers that take them
EVALUATION_FLAGS = ("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size")
DDP_FLAGS = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")


def refused_flags(arguments: Arguments) -> Iterator[str]:
    """Yield a fault for each flag that was given and cannot be served."""
    for name in _changed(arguments, REFUSED):
        yield f"--{name} {arguments.given(name)}: {REFUSED[name]}: omit the flag"
    size = arguments.batch.sequence_parallel_size
    if size > 1 and arguments.evaluates():  # accelerate 1.15 exchanges no tokens for heads in evaluation
        yield (
            f"--sequence_parallel_size {size}: held-out conversations are not evaluated on shared rows: leave out "
            "--validation_share and --eval_data_path; `finetune evaluate` measures the result"
        )


def flags_without_effect(arguments: Arguments) -> Iterator[str]:
    """Yield a line for each flag that was given and changes nothing in this run."""
    for name in _changed(arguments, WITHOUT_EFFECT):
        value = "***" if name in SECRETS else arguments.given(name)
        yield f"--{name} {value} has no effect: {WITHOUT_EFFECT[name]}"
    get = arguments.given
    steps = get("max_steps")
    adam = any(part in str(get("optim") or "adamw") for part in ADAM_OPTIMIZERS)
    dependent: tuple[tuple[tuple[str, ...], bool, str], ...] = (
        (("num_train_epochs",), steps > 0, f"--max_steps {steps} decides"),
        (("save_steps",), get("save_strategy") != "steps", f"--save_strategy is {get('save_strategy')}"),
        (("save_total_limit", "save_only_model"), get("save_strategy") == "no", "--save_strategy is no"),
        (("logging_steps",), get("logging_strategy") != "steps", f"--logging_strategy is {get('logging_strategy')}"),
        (EVALUATION_FLAGS, not arguments.evaluates(), "no conversations are held out"),
        (("eval_steps",), arguments.evaluates() and _eval_strategy(arguments) != "steps",
         f"--eval_strategy is {_eval_strategy(arguments)}"),
        (ADAM_FLAGS, not adam, f"--optim is {get('optim')}"),
        (("liger_kernel_config",), not get("use_liger_kernel"), "--use_liger_kernel is False"),
        (("activation_checkpointing_kwargs",), not get("activation_checkpointing"),
         "--activation_checkpointing is False"),
        (("dataloader_prefetch_factor", "dataloader_persistent_workers"), not get("dataloader_num_workers"),
         "--dataloader_num_workers is 0"),
        (DDP_FLAGS, bool(get("deepspeed")), "DeepSpeed averages the gradients"),
    )  # fmt: skip
    for names, applies, reason in dependent:
        for name in filter(arguments.was_given, names if applies else ()):
            yield f"--{name} {get(name)} has no effect: {reason}"


def _eval_strategy(arguments: Arguments) -> str:
    return str(arguments.training.get("eval_strategy", "epoch"))


def _changed(arguments: Arguments, names: Iterable[str]) -> list[str]:
    """Return the flags among `names` that were given with another value than the default."""
    given = arguments.training
    return [name for name in names if name in given and given[name] not in (default_of(name), None, "")]
