"""Where a run goes on: the newest whole checkpoint, chosen by all ranks before a weight is loaded.

A resumed run is the uninterrupted one to the last bit when nothing that shapes its numbers has changed. What has is
refused with both values; `--allow_inexact_resume True` goes on and records it in run.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import checkpoints, console, results
from finetune.arguments import Arguments
from finetune.checking import Setup
from finetune.checkpoints import Manifest
from finetune.dataset import PreparedData
from finetune.errors import CheckpointError, ConfigError, StorageError, listed
from finetune.ranks import Disk, gathered, host_names, on_rank_0, this_rank, together

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


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that all ranks have found whole, and what is not as it was."""

    folder: Path
    manifest: Manifest
    changes: tuple[str, ...]
    is_reshaped: bool

    def folder_to_load(self, output_dir: Path) -> Path:
        """The checkpoint's, or that of its form for another number of ranks; all ranks.

        Raises:
            CheckpointError: it cannot be converted.
            StorageError: there is no room for it.
        """
        if not self.is_reshaped or self.manifest.facts["ZeRO stage"] == "none":
            return self.folder
        target = checkpoints.universal_folder(output_dir, self.manifest.step)
        on_rank_0(lambda: checkpoints.convert(self.folder, self.manifest, target))
        return target

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "step": self.manifest.step,
            "from": str(self.folder),
            "at": results.now(),
            "changes": list(self.changes),
        }


def facts_of(arguments: Arguments, setup: Setup, data: PreparedData) -> dict[str, Any]:
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


def find_checkpoint(arguments: Arguments, setup: Setup, data: PreparedData, disk: Disk) -> Resumption | None:
    """The checkpoint to go on from, verified and readable by every rank; None for a run from the start. All ranks.

    Raises:
        CheckpointError: the one that was asked for is damaged, or all are; it was made by another run, on another
            number of ranks, or in a way that differs.
        ConfigError: there is no such folder.
    """
    asked = arguments.resumes_from()
    if asked is None:
        return None
    output_dir = Path(arguments.training["output_dir"]).expanduser()
    if asked == "auto":
        folder, faults = _newest_whole(output_dir, disk, may_lack_random_state=arguments.run.allow_inexact_resume)
    else:
        folder = _the_one(Path(asked).expanduser())
        faults = _all_faults(folder, _sharing(folder, output_dir, disk))
    if folder is None:
        return None
    waived = [fault for fault in faults if arguments.run.allow_inexact_resume and _is_missing_random_state(fault)]
    if len(waived) < len(faults):
        raise CheckpointError(f"--resume_from_checkpoint {folder}: {listed(faults, 'fault')}")
    manifest = checkpoints.read_manifest(folder)
    if asked == "auto":
        on_rank_0(lambda: _check_run_id(output_dir, folder, manifest))
    changes = [*on_rank_0(lambda: _compared(arguments, setup, data, folder, manifest)), *waived]
    is_reshaped = manifest.world_size != setup.world_size
    if is_reshaped and not disk.is_shared:
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, now there are {setup.world_size}: to go on on "
            "another number of ranks all must see one folder: copy the parts of all hosts to a shared file system"
        )
    if is_reshaped != setup.expects_other_ranks:
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, unlike the newer one, which is damaged and out of "
            "the way now: start the same command again"
        )
    _set_later_aside(output_dir, folder, manifest.step, disk)
    for line in (*changes, *_other_versions(manifest)):
        console.say_note(f"not as it was when {folder.name} was written: {line}")
    console.say_note(f"going on from {folder}, step {manifest.step}")
    return Resumption(folder, manifest, tuple(changes), is_reshaped)


def _newest_whole(output_dir: Path, disk: Disk, *, may_lack_random_state: bool) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole on every disk, with the faults it may have; damaged ones are set aside."""

    def look() -> list[int]:
        if not disk.is_writer:
            return []
        try:
            for left in checkpoints.remove_unfinished(output_dir):
                console.say_note(f"{left}: its save was not finished: removed")
        except OSError as error:
            raise StorageError(f"{output_dir}: {error}") from None
        return checkpoints.steps_in(output_dir)

    steps = sorted(set().union(*together(look)), reverse=True)
    was_sealed = []
    for step in steps:
        folder = checkpoints.checkpoint_folder(output_dir, step)
        was_sealed.append(any(gathered(checkpoints.is_sealed(folder))))
        faults = _all_faults(folder, disk.ranks)
        if may_lack_random_state and all(map(_is_missing_random_state, faults)) or not faults:
            return folder, faults
        aside = together(lambda folder=folder: _set_aside(folder, "damaged") if disk.is_writer else None)
        console.say_note(f"{listed(faults, 'fault')}: {folder.name} is set aside as {next(filter(None, aside)).name}")
    sealed_once = on_rank_0(lambda: results.last_checkpoint(output_dir))
    if any(was_sealed) or sealed_once is not None:
        raise CheckpointError(
            f"{output_dir}: no checkpoint is whole, and this run has had some: to start again from step 0 choose "
            "another --output_dir, or give --overwrite_output_dir True without --resume_from_checkpoint"
        )
    if on_rank_0(lambda: results.is_complete(output_dir)):
        raise ConfigError(
            f"--output_dir {output_dir}: holds a run that is complete, and no checkpoint to go on from: choose another "
            "folder, or give --overwrite_output_dir True without --resume_from_checkpoint to move it aside"
        )
    console.say_note(f"{output_dir} holds no checkpoint yet: starting from step 0")
    return None, []


def _set_aside(folder: Path, why: str) -> Path | None:
    try:
        return checkpoints.set_aside(folder, why) if folder.exists() else None
    except OSError as error:
        raise StorageError(f"{folder}: cannot be set aside: {error.strerror}") from None


def _the_one(folder: Path) -> Path:
    there = gathered(folder.is_dir())
    if not any(there):
        raise ConfigError(f"--resume_from_checkpoint {folder}: there is no such folder")
    return folder


def _check_run_id(output_dir: Path, folder: Path, manifest: Manifest) -> None:
    known = results.run_id(output_dir)
    if known is not None and known != manifest.run_id:
        raise CheckpointError(
            f"{folder} is of run {manifest.run_id}, {output_dir / results.RUN_FILE} of run {known}: to go on from it, "
            f"name it: --resume_from_checkpoint {folder}"
        )


def _all_faults(folder: Path, sharing: tuple[int, ...]) -> list[str]:
    """Faults that any rank finds; those that see the same files share the work. None: every rank can read its part."""
    names = host_names()
    found = _faults_here(folder, sharing, all_of_it=len(sharing) == len(names))
    several = len(set(names)) > 1 and len(sharing) < len(names)
    every = gathered([f"{fault} (on {names[this_rank()]})" if several else fault for fault in found])
    return list(dict.fromkeys(fault for faults in every for fault in faults))


def _faults_here(folder: Path, sharing: tuple[int, ...], *, all_of_it: bool) -> list[str]:
    try:
        manifest = checkpoints.read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    needed = manifest.files if all_of_it else manifest.names_for(sharing)
    part = sharing.index(this_rank())
    names = checkpoints.shared_out(manifest, needed, part, len(sharing))
    found = checkpoints.faults(folder, manifest, names)
    if part == 0:
        unlisted = set(checkpoints.names_in(folder)) - set(manifest.files)
        found += [
            f"{folder / name} is not in {checkpoints.MANIFEST_FILE}"
            for name in sorted(unlisted)
            if checkpoints.is_pickled(Path(name))
        ]
    for path in (folder / name for name in names):
        if checkpoints.is_pickled(path) and path.is_file():
            try:
                fault = checkpoints.pickle_fault(path)
            except OSError as error:
                fault = f"{path} cannot be read: {error.strerror}"
            found += [fault] if fault else []
    return found


def _is_missing_random_state(fault: str) -> bool:
    """Without it the numbers differ, and nothing else: `--allow_inexact_resume` may do without."""
    return re.search(r"/rng_state(_\d+)?\.pth is missing", fault) is not None


def _sharing(folder: Path, output_dir: Path, disk: Disk) -> tuple[int, ...]:
    """The ranks that see the same files in `folder` as this one: elsewhere than in output_dir, those of its host."""
    names = host_names()
    if folder.resolve().parent == output_dir.resolve():
        return disk.ranks
    return tuple(rank for rank, name in enumerate(names) if name == names[this_rank()])


def _compared(arguments: Arguments, setup: Setup, data: PreparedData, folder: Path, manifest: Manifest) -> list[str]:
    """What is not as it was, each as a line.

    Raises:
        CheckpointError: it must be, or it was not allowed to change.
    """
    if not manifest.is_resumable:
        raise CheckpointError(
            f"{folder}: was saved with --save_only_model True: without optimizer state no run can go on from it"
        )
    step_rows = arguments.step_rows(setup.world_size)
    reshapes = manifest.world_size != setup.world_size
    if reshapes and arguments.run.resume_world_size != "any":
        raise CheckpointError(
            f"{folder}: was written by {manifest.world_size} ranks, now there are {setup.world_size}: start as many, "
            "or give --resume_world_size any to go on with the same global batch on these"
        )
    changes = changes_between(manifest.facts, facts_of(arguments, setup, data), arguments)
    if reshapes or arguments.run.resume_world_size == "any":
        for name in OF_A_STEP:
            changes.pop(f"--{name}", None)
        if step_rows != manifest.step_rows:
            changes["rows of a step"] = (manifest.step_rows, step_rows)
    harmless = [f"ranks: {manifest.world_size}, now {setup.world_size}"] if reshapes else []
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


def _other_versions(manifest: Manifest) -> list[str]:
    """Libraries that have another version now: most give the same numbers, and none promises to."""
    here = results.library_versions()
    return [
        f"{name} {version}, now {here.get(name, 'not installed')}"
        for name, version in manifest.versions.items()
        if here.get(name) != version
    ]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _set_later_aside(output_dir: Path, chosen: Path, step: int, disk: Disk) -> None:
    """Checkpoints behind the chosen one are of steps that this run will make anew."""
    if chosen.resolve().parent != output_dir.resolve():
        return

    def rename() -> list[Path]:
        if not disk.is_writer:
            return []
        later = [one for one in checkpoints.steps_in(output_dir) if one > step]
        return [_set_aside(checkpoints.checkpoint_folder(output_dir, one), "later") for one in later]

    for aside in set().union(*together(rename)):
        console.say_note(f"a later checkpoint than {chosen.name} is set aside as {aside.name}")
