"""Compare a run with the checkpoint that it resumes from.

A resumed run equals the uninterrupted one to the last bit when nothing that decides its numbers has changed. What has
changed is refused with both values; `--allow_inexact_resume True` resumes anyway and records it in run.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.checkpoint import Manifest
from finetune.config import Arguments
from finetune.dataset.prepare import PreparedData
from finetune.training.config_check import Setup
from finetune.utils.errors import CheckpointError

# Flags that leave the numbers of a run alone, or whose effect on them is compared under another name (the data by what
# it holds, the model by its files, the batch by its product where ranks may change).
FREE = frozenset(
    "output_dir data_path model_name_or_path model_revision trust_remote_code data_cache_dir preprocessing_num_workers "
    "max_dropped_rows deepspeed bf16 fp16 tf32 use_cpu report_to run_name project trackio_space_id "
    "resume_from_checkpoint logging_steps save_strategy save_steps save_total_limit save_on_each_node save_only_model "
    "logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_level log_level_replica "
    "log_on_each_node disable_tqdm dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor activation_checkpointing activation_checkpointing_kwargs ddp_timeout local_rank "
    "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
    "torch_empty_cache_steps skip_memory_metrics eval_strategy eval_steps eval_delay eval_on_start eval_data_path "
    "per_device_eval_batch_size load_best_model_at_end metric_for_best_model greater_is_better prediction_loss_only "
    "enable_jit_checkpoint remove_unused_columns restore_callback_states_from_checkpoint".split()
)
OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Written down even where the user leaves them to their defaults, which another version of transformers may change.
ALWAYS = (
    *OF_A_STEP, "seed", "data_seed", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip
# Other numbers than these can be trained on; a model of another shape cannot take the checkpoint's.
NEVER = frozenset(
    "--use_lora --adapter --lora_r --lora_target_modules --use_dora --modules_to_save --num_virtual_tokens "
    "--new_tokens".split()
) | {"ZeRO stage"}
STAGES_DIFFER = (
    "stages 1 and 2 divide the optimizer's state, stage 3 each parameter, and DeepSpeed converts neither into the other"
)
ROWS_LEFT_OUT = "rows left out by --skip_rows"
SHOWN_CHARACTERS = 60


def resume_facts(arguments: Arguments, setup: Setup, data: PreparedData) -> dict[str, Any]:
    """What must be the same for a resumed run to be the uninterrupted one, by the names that users know."""
    flags = {**{name: arguments.given(name) for name in ALWAYS}, **arguments.flat()}
    facts = {f"--{name}": value for name, value in sorted(flags.items()) if name not in FREE}
    zero = setup.zero.config if setup.zero else {}
    examples = len(data.epoch(arguments.given("seed")))
    left_out = {ROWS_LEFT_OUT: [f"{source}:{row}" for source, row in data.left_out]} if data.left_out else {}
    found = {
        **facts,
        **left_out,
        "data": f"{data.fingerprint}, {data.summary.tokens:,} tokens in {examples:,} examples",
        "base model": setup.model.fingerprint,
        "precision": setup.hardware.precision,
        "ZeRO stage": setup.zero.stage if setup.zero else "none",
        "optimizer": zero.get("optimizer", "of the command line"),
    }
    return json.loads(json.dumps(found))  # as a manifest gives it back


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any], arguments: Arguments) -> dict[str, tuple[Any, Any]]:
    """What differs, by name: (old value, new value). A flag that one side does not give has its default there."""
    found = {}
    for name in dict.fromkeys((*old, *new)):
        default = None
        if name.startswith("--") and (name not in old or name not in new):
            default = arguments.default(name[2:])
        before, after = old.get(name, default), new.get(name, default)
        if before != after:
            found[name] = (before, after)
    return found


def compare_with_checkpoint(
    arguments: Arguments, facts: Mapping[str, Any], world_size: int, folder: Path, manifest: Manifest
) -> list[str]:
    """What is not as it was, each as a line.

    Raises:
        CheckpointError: it must be, or it was not allowed to change.
    """
    if not manifest.is_resumable:
        raise CheckpointError(
            f"{folder}: was saved with --save_only_model True: without optimizer state no run can go on from it"
        )
    step_rows = arguments.step_rows(world_size)
    reshapes = manifest.world_size != world_size
    if reshapes and arguments.run.resume_world_size != "any":
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, now there are {world_size}: start as many, "
            "or give --resume_world_size any to go on with the same global batch on these"
        )
    changes = changes_between(manifest.facts, facts, arguments)
    if reshapes or arguments.run.resume_world_size == "any":
        for name in OF_A_STEP:
            changes.pop(f"--{name}", None)
        if step_rows != manifest.step_rows:
            changes["rows of a step"] = (manifest.step_rows, step_rows)
    harmless = [f"ranks: {manifest.world_size}, now {world_size}"] if reshapes else []
    old, new = (one or [] for one in changes.get(ROWS_LEFT_OUT, ([], [])))
    if set(old) < set(new):  # more than before: the user asked for it, by naming them
        del changes[ROWS_LEFT_OUT]
        harmless.append(f"{ROWS_LEFT_OUT}: {len(old)}, now {len(new)}")
    if set(changes.get("ZeRO stage", ())) == {1, 2}:  # both divide the same optimizer alike
        harmless.append("ZeRO stage: {}, now {}".format(*changes.pop("ZeRO stage")))
    lines = [f"{name}: {_shown(old)}, now {_shown(new)}" for name, (old, new) in changes.items()]
    never = [line for line, name in zip(lines, changes, strict=True) if name in NEVER]
    if never:
        why = f" ({STAGES_DIFFER})" if any(line.startswith("ZeRO stage") for line in never) else ""
        raise CheckpointError(
            f"{folder} cannot be taken by this run: {'; '.join(never)}{why}: start as it was started, or a new run in "
            "another --output_dir"
        )
    if lines and not arguments.run.allow_inexact_resume:
        raise CheckpointError(
            f"{folder}: the resumed run would not be the one that was interrupted: {'; '.join(lines)}: start as it "
            "was started, or give --allow_inexact_resume True, which goes on and records it"
        )
    return [*lines, *harmless]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
