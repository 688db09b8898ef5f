"""Compare a run with the checkpoint that it resumes from.

A resumed run equals the uninterrupted one to the last bit when nothing that decides its numbers has changed. What has
changed is refused with both values; `--allow_inexact_resume True` resumes anyway and records it in run.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.checkpoint import Manifest, key_of
from finetune.checkpoint.manifest import DAY, SKIPPED_ROWS, STAGE
from finetune.checkpoint.resume import saved_manifest
from finetune.config.adapter_arguments import LORA_DROPOUT
from finetune.config.arguments import default_of
from finetune.config.flag_support import WITHOUT_EFFECT
from finetune.config.run_config import BatchConfig, CheckpointConfig, RunConfig
from finetune.config.saved_adapter import MOVES_BASE
from finetune.utils.errors import CheckpointError, shorten

if TYPE_CHECKING:
    from finetune.dataset.prepare import PreparedData

# Flags that do not change the numbers of a run, or whose effect is compared under another name: the data by content,
# the model by its files, the batch by its product where the number of ranks may change.
FREE = frozenset(
    "output_dir data_path model_name_or_path adapter_name_or_path model_revision trust_remote_code data_cache_dir "
    "preprocessing_num_workers max_dropped_rows allow_seen_held_out deepspeed bf16 fp16 tf32 use_cpu report_to "
    "run_name project trackio_space_id "
    "resume_from_checkpoint logging_steps save_strategy save_steps save_total_limit save_only_model "
    "logging_strategy logging_first_step logging_dir log_level log_level_replica "
    "log_on_each_node dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor activation_checkpointing activation_checkpointing_kwargs ddp_timeout local_rank "
    "torch_empty_cache_steps skip_memory_metrics eval_strategy eval_steps eval_delay eval_on_start eval_data_path "
    "per_device_eval_batch_size load_best_model_at_end metric_for_best_model "
    "trackio_bucket_id trackio_static_space_id include_num_input_tokens_seen auto_find_batch_size "
    "gradient_checkpointing gradient_checkpointing_kwargs ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph debug do_train".split()
) | frozenset(WITHOUT_EFFECT)
STEP_FLAGS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Differences that no run can resume over: a model of another shape cannot load the checkpoint, nor can another
# optimizer its states.
NEVER = frozenset(
    "--use_lora --adapter --lora_r --lora_target_modules --use_dora --modules_to_save --num_virtual_tokens "
    "--new_tokens --adapter_config --freeze --train_only --optim --optim_args --optim_target_modules".split()
) | {STAGE}
SAME_STATES = ("adamw_torch", "adamw_torch_fused")  # values of --optim
# Schedules that move the learning rate by what they have seen: their state fits no other rate or factor.
ADAPTIVE_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
GROUP_FLAGS = ("--embedding_learning_rate", "--loraplus_lr_ratio")  # each makes groups of parameters
SCHEDULE_FLAGS = ("--learning_rate", "--lr_scheduler_type", "--lr_scheduler_kwargs")
OF_FLAGS = "of the command line"
SINCE_0_2 = ("loss scaling", DAY)  # facts that older manifests lack
STAGES_DIFFER = (
    "stages 1 and 2 partition optimizer states, stage 3 each parameter, and DeepSpeed converts neither into the other"
)


def resume_facts(config: RunConfig, data: PreparedData, model_fingerprint: str) -> dict[str, Any]:
    """Collect what must be the same for a resumed run to equal the uninterrupted one, by the names that users know."""
    precision = config.hardware.precision
    examples = len(data.epoch(config.batch.seed).examples)
    skipped = {SKIPPED_ROWS: [f"{source}:{row}" for source, row in data.skipped_rows]} if data.skipped_rows else {}
    sections = config.deepspeed.config if config.deepspeed else {}
    facts = {
        **_flag_facts(config),
        **skipped,
        "data": f"{data.fingerprint}, {data.summary.tokens:,} tokens in {examples:,} examples",
        **({DAY: data.day} if data.day else {}),
        "base model": model_fingerprint,
        "precision": precision,
        "optimizer": sections.get("optimizer", OF_FLAGS),
        **({"loss scaling": sections.get("fp16")} if precision == "fp16" else {}),
    }
    return json.loads(json.dumps(facts))  # as a manifest gives it back


def _flag_facts(config: RunConfig) -> dict[str, Any]:
    flags = {f"--{name}": value for name, value in sorted(config.resume_flags.items()) if name not in FREE}
    return {**flags, STAGE: config.zero_stage if config.deepspeed else "none"}


def check_before_ranks(config: RunConfig, fingerprint: str | None) -> None:
    """Compare what is known before ranks start with the checkpoint to resume from: flags, ranks and data.

    Args:
        fingerprint: Of the data; None where it is not known yet.

    Raises:
        CheckpointError: As `compare_with_checkpoint`, which the ranks call with all facts.
    """
    key, saving = key_of(config.checkpoint.verify_key), config.checkpoint
    folder, manifest = saved_manifest(saving.output_dir, saving.resume_from, key)
    if manifest is None:
        return
    flags = json.loads(json.dumps(_flag_facts(config)))
    old = {name: value for name, value in manifest.facts.items() if name.startswith("--") or name == STAGE}
    if fingerprint is not None:
        flags["data"], old["data"] = fingerprint, str(manifest.facts.get("data")).partition(",")[0]
    compare_with_checkpoint(flags, config.batch, saving, folder, replace(manifest, facts=old))


def saved_day(config: CheckpointConfig) -> date | None:
    """Return the date that the chat template wrote in the run to resume; None if it wrote none."""
    _, manifest = saved_manifest(config.output_dir, config.resume_from, key_of(config.verify_key))
    day = manifest.facts.get(DAY) if manifest else None
    return date.fromisoformat(day) if day else None


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs, by name: (old value, new value). A flag that one side lacks has its default there."""
    differences = {}
    for name in dict.fromkeys((*old, *new)):
        if name in SINCE_0_2 and name not in old:
            continue
        default = None
        if name.startswith("--") and (name not in old or name not in new):
            default = default_of(name[2:])
        before, after = old.get(name, default), new.get(name, default)
        if name == "--lora_dropout":  # without it, where experts are wrapped there is none, and no other run either
            before, after = (LORA_DROPOUT if value is None else value for value in (before, after))
        if before != after:
            differences[name] = (before, after)
    return differences


def compare_with_checkpoint(
    facts: Mapping[str, Any], batch: BatchConfig, config: CheckpointConfig, folder: Path, manifest: Manifest
) -> list[str]:
    """Return what differs from the run that wrote the checkpoint, one line each; `facts` are of this run."""
    if not manifest.is_resumable:
        raise CheckpointError(
            f"{folder}: was saved with --save_only_model True: no run can resume without the optimizer state"
        )
    reshapes = manifest.world_size != batch.world_size
    if reshapes and not config.any_world_size:
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, now there are {batch.world_size}: start as many, "
            "or give --resume_world_size any to resume with the same global batch on these"
        )
    differences = find_differences(manifest.facts, facts)
    if reshapes or config.any_world_size:
        for name in STEP_FLAGS:
            differences.pop(f"--{name}", None)
        if batch.step_rows != manifest.step_rows:
            differences["rows of a step"] = (manifest.step_rows, batch.step_rows)
    harmless = [f"ranks: {manifest.world_size}, now {batch.world_size}"] if reshapes else []
    old, new = (rows or [] for rows in differences.get(SKIPPED_ROWS, ([], [])))
    if set(old) < set(new):  # the user asked for more by naming them
        del differences[SKIPPED_ROWS]
        harmless.append(f"{SKIPPED_ROWS}: {len(old)}, now {len(new)}")
    if set(differences.get(STAGE, ())) == {1, 2}:  # both partition the same optimizer states
        harmless.append("ZeRO stage: {}, now {}".format(*differences.pop(STAGE)))
    lines = [f"{name}: {shorten(str(old))}, now {shorten(str(new))}" for name, (old, new) in differences.items()]
    refused = {name for name, values in differences.items() if _is_refused(name, *values, flags=facts)}
    never = [line for line, name in zip(lines, differences, strict=True) if name in refused]
    if never:
        why = f" ({STAGES_DIFFER})" if any(line.startswith(STAGE) for line in never) else ""
        raise CheckpointError(
            f"{folder}: this run cannot resume from it: {'; '.join(never)}{why}: start with the same flags, or a new "
            "run in another --output_dir"
        )
    if lines and not config.allow_inexact:
        raise CheckpointError(
            f"{folder}: the resumed run would differ from the interrupted one: {'; '.join(lines)}: start with the same "
            "flags and data, or give --allow_inexact_resume True, which resumes and records it"
        )
    return [*lines, *harmless]


def _is_refused(name: str, old: Any, new: Any, *, flags: Mapping[str, Any]) -> bool:
    """Whether no run can resume over this difference, whatever the user allows."""
    if name == "--optim":
        return old not in SAME_STATES or new not in SAME_STATES
    if name == "optimizer":  # section of the DeepSpeed JSON
        types = [section.get("type") if isinstance(section, Mapping) else section for section in (old, new)]
        return OF_FLAGS in types or (types[0] != types[1] and any(kind not in ("Adam", "AdamW") for kind in types))
    if name in GROUP_FLAGS:
        return None in (old, new)
    if name == "--init_lora_weights":  # the base is moved at the start, before the checkpoint is loaded
        return any(str(start).startswith(MOVES_BASE) for start in (old, new))
    if name in SCHEDULE_FLAGS:
        return any(value in ADAPTIVE_SCHEDULES for value in (flags["--lr_scheduler_type"], old, new))
    return name in NEVER
