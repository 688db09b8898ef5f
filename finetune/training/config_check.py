"""Everything that can be found wrong before data is read or a weight is loaded, and what was decided on the way."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune import checkpoint, launcher
from finetune.config import Arguments
from finetune.config.deepspeed_config import (
    DeepSpeedFlags,
    ResolvedDeepSpeedConfig,
    find_config,
    load_config,
    resolve_deepspeed_config,
)
from finetune.config.hardware import DetectedHardware, HardwareConfig, detect_hardware, resolve_hardware
from finetune.distributed import watchdog
from finetune.distributed.op_builder import build_notes
from finetune.distributed.startup_timer import timed
from finetune.models import loader
from finetune.run_dir import output_dir_lock
from finetune.training.trackers import check_trackers
from finetune.utils.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")  # the last is what is always done


@dataclass(frozen=True)
class RankCounts:
    """How many ranks a run has, and how many of them are on one host."""

    size: int
    local_size: int


@dataclass(frozen=True)
class Setup:
    """What was found and decided before anything expensive."""

    hardware: HardwareConfig
    zero: ResolvedDeepSpeedConfig | None
    model: loader.ModelInfo
    world_size: int
    move_aside: bool
    activation_checkpointing: bool
    notes: tuple[str, ...]
    expects_other_ranks: bool = False  # of the checkpoint to go on from; only --resume_world_size any allows it


@timed("checks")
def check_setup(arguments: Arguments) -> Setup:
    """`examine`, for the run that this process is a rank of; says what was decided."""
    size = int(os.environ["WORLD_SIZE"])
    world = RankCounts(size, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size))
    _check_world(size)
    setup = resolve_setup(arguments, detect_hardware(use_cpu=bool(arguments.given("use_cpu"))), world)
    for note in setup.notes:
        logger.warning(note)
    return setup


def resolve_setup(arguments: Arguments, found: DetectedHardware, world: RankCounts) -> Setup:
    """Everything that can be found wrong without reading data or weights, for ranks on such hardware.

    Raises:
        ConfigError: flags that exclude each other, or that the model, the hardware or the ranks cannot do.
    """
    output_dir = Path(arguments.training["output_dir"]).expanduser()
    if output_dir.resolve() == Path(arguments.model.model_name_or_path).expanduser().resolve():
        raise ConfigError(f"--output_dir {output_dir}: is the folder of the model itself")
    evaluation_options(arguments)
    asked = arguments.given("report_to")
    check_trackers([asked] if isinstance(asked, str) else asked or [])
    _check_sampling(arguments)
    move_aside = output_dir_lock.check_output_dir(
        output_dir,
        overwrite=arguments.run.overwrite_output_dir,
        resume=arguments.resumes_from() is not None,
    )
    hardware = resolve_hardware(
        found,
        bf16=bool(arguments.given("bf16")),
        fp16=bool(arguments.given("fp16")),
        tf32=arguments.given("tf32"),
        attn_implementation=arguments.model.attn_implementation,
    )
    _check_liger(arguments, hardware)
    reshaping = _keep_the_global_batch(arguments, world.size)
    zero = _resolve_zero(arguments, hardware, world)
    if zero is not None and reshaping:
        zero.config.setdefault("checkpoint", {})["load_universal"] = True
    checked = loader.inspect_model(
        arguments.model.model_name_or_path,
        revision=arguments.model.model_revision,
        trust_remote_code=arguments.model.trusts_code(),
        attention=hardware.attention,
    )
    _check_sequence_parallel(arguments, checked.config, world.size)
    checkpointing, checkpointing_notes = _checkpointing(arguments, checked)
    building = []
    if zero is not None:
        building = build_notes(Path(os.environ["TORCH_EXTENSIONS_DIR"]), use_cpu=hardware.use_cpu)
    notes = (
        *arguments.notes,
        *_saving_notes(arguments),
        *reshaping,
        *hardware.notes,
        *(zero.notes if zero else ()),
        *checked.notes,
        *checkpointing_notes,
        *building,
    )
    return Setup(hardware, zero, checked, world.size, move_aside, checkpointing, notes, bool(reshaping))


def evaluation_options(arguments: Arguments) -> dict[str, Any]:
    """What `TrainingArguments` is to be told about held-out conversations; nothing without any.

    Raises:
        ConfigError: flags that need held-out conversations, and there are none; a metric that is not computed.
    """
    if not arguments.evaluates():
        asked = arguments.given("eval_strategy") not in ("no", None)
        needs = {
            "eval_strategy": asked, "load_best_model_at_end": arguments.given("load_best_model_at_end"),
            "early_stopping_patience": arguments.run.early_stopping_patience is not None,
            "save_strategy best": arguments.given("save_strategy") == "best",
        }  # fmt: skip
        for name in (name for name, given in needs.items() if given):
            raise ConfigError(f"--{name}: needs held-out conversations: give --eval_data_path or --validation_share")
        return {}
    patience, metric = arguments.run.early_stopping_patience, arguments.given("metric_for_best_model")
    if patience is not None and patience < 1:
        raise ConfigError(f"--early_stopping_patience {patience}: expected at least 1")
    if metric not in (None, "loss", "eval_loss"):
        raise ConfigError(f"--metric_for_best_model {metric}: expected eval_loss, the only one that is computed")
    return {
        "eval_strategy": arguments.training.get("eval_strategy", "epoch"),
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "prediction_loss_only": True,
    }


def _check_world(world_size: int) -> None:
    """As many ranks as the hostfile says: the launcher takes a file that is not there for an order to train alone.

    `finetune launch` says how many there must be; a bare `deepspeed` of this host is asked what it was told.
    """
    stated, words = os.environ.get("FINETUNE_WORLD_SIZE"), watchdog.runner_arguments(watchdog.launcher_pid())
    expected, where = int(stated or world_size), "the hostfile"
    if stated is None and words is not None:
        resources = launcher.resources_of_command(words)
        if resources is not None:
            expected, where = resources.world_size, f"--hostfile {resources.path}"
    if expected != world_size:
        raise ConfigError(
            f"{where} names {expected} ranks, but {world_size} were started: start with `finetune launch`"
        )


def _keep_the_global_batch(arguments: Arguments, world_size: int) -> list[str]:
    """Divide the step of a checkpoint from another number of ranks among these; a line that says how.

    It is read here, before any rank can ask another, because DeepSpeed's config says how large a batch is.
    """
    manifest = _checkpoint_of_another_shape(arguments, world_size)
    if manifest is None:
        return []
    groups, rest = divmod(world_size, arguments.batch.sequence_parallel_size)
    if rest or manifest.step_rows % groups:
        raise ConfigError(
            f"--resume_world_size any: a step of {manifest.step_rows} rows cannot be divided among {groups} ranks: "
            f"start as many as divide {manifest.step_rows}"
        )
    share = manifest.step_rows // groups
    rows = next(rows for rows in range(min(arguments.per_device_batch(), share), 0, -1) if share % rows == 0)
    arguments.training["gradient_accumulation_steps"] = share // rows
    if arguments.batch.tokens_per_device_batch is None:
        arguments.training["per_device_train_batch_size"] = rows
    return [
        f"a step stays {manifest.step_rows} rows on {groups} ranks instead of {manifest.world_size}: "
        f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {share // rows}"
    ]


def _checkpoint_of_another_shape(arguments: Arguments, world_size: int) -> checkpoint.Manifest | None:
    asked = arguments.resumes_from()
    if asked is None or arguments.run.resume_world_size != "any":
        return None
    folders = [Path(asked).expanduser()]
    if asked == "auto":
        output_dir = Path(arguments.training["output_dir"]).expanduser()
        folders = [checkpoint.checkpoint_folder(output_dir, step) for step in checkpoint.steps_in(output_dir)]
    for folder in filter(checkpoint.is_complete, folders):
        with suppress(CheckpointError):  # what is wrong with it is said when all ranks look at it
            manifest = checkpoint.read_manifest(folder)
            return manifest if manifest.world_size != world_size else None
    return None


def _saving_notes(arguments: Arguments) -> list[str]:
    if arguments.given("save_strategy") == "no":
        return []
    if arguments.given("save_only_model"):
        return ["--save_only_model True: checkpoints hold no optimizer state, and no run can go on from them"]
    keep = arguments.given("save_total_limit")
    if keep and keep > 0 and not arguments.was_given("save_total_limit"):
        return [f"the newest {keep} checkpoints are kept, older ones are removed: --save_total_limit 0 keeps all"]
    return []


def _check_sampling(arguments: Arguments) -> None:
    if arguments.given("auto_find_batch_size"):
        raise ConfigError(
            "--auto_find_batch_size True: a step must stay what it is; give --tokens_per_device_batch, or a smaller "
            "--per_device_train_batch_size with more --gradient_accumulation_steps"
        )
    strategy = arguments.given("train_sampling_strategy")
    if strategy not in STRATEGIES:
        raise ConfigError(f"--train_sampling_strategy {strategy}: expected {', '.join(STRATEGIES)}")


def _check_liger(arguments: Arguments, hardware: HardwareConfig) -> None:
    if not arguments.given("use_liger_kernel"):
        return
    if hardware.use_cpu:
        raise ConfigError("--use_liger_kernel True: its kernels need a GPU, and there is none here: leave the flag out")
    if find_spec("liger_kernel") is None:
        raise ConfigError("--use_liger_kernel True: it is not installed: pip install liger-kernel")


def _resolve_zero(arguments: Arguments, hardware: HardwareConfig, world: RankCounts) -> ResolvedDeepSpeedConfig | None:
    name = arguments.given("deepspeed")
    if not name:
        return None
    asked = "bf16" if arguments.given("bf16") else "fp16" if arguments.given("fp16") else "float32"
    command = DeepSpeedFlags(
        **{
            flag: arguments.given(flag)
            for flag in DeepSpeedFlags.__dataclass_fields__
            if flag not in ("per_device_train_batch_size", "precision", "precision_was_replaced")
        },
        per_device_train_batch_size=arguments.deepspeed_batch(),
        precision=hardware.precision,
        precision_was_replaced=asked != hardware.precision,
    )
    path = find_config(name)
    return resolve_deepspeed_config(
        path,
        load_config(path),
        command,
        world_size=world.size,
        local_world_size=world.local_size,
        use_cpu=hardware.use_cpu,
        sequence_parallel_size=arguments.batch.sequence_parallel_size,
    )


def _check_sequence_parallel(arguments: Arguments, config: Any, world_size: int) -> None:
    """Each rank of a group gets the same share of a conversation's tokens, and in attention of its heads."""
    size = arguments.batch.sequence_parallel_size
    if size == 1:
        return
    config = config.get_text_config()
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    faults = {
        "it needs DeepSpeed: give --deepspeed zero3": not arguments.given("deepspeed"),
        f"it does not divide the {world_size} ranks": world_size % size,
        f"it does not divide the model's {heads} attention heads": heads % size,
        f"the model's {key_heads} key heads neither divide it nor are divided by it": key_heads % size
        and size % key_heads,
        "ranks can only share flat or packed rows: leave out --batching padded": arguments.batch.batching == "padded",
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    if found:
        raise ConfigError(f"--sequence_parallel_size {size}: " + "; ".join(found))


def _checkpointing(arguments: Arguments, checked: loader.ModelInfo) -> tuple[bool, list[str]]:
    wanted = bool(arguments.given("activation_checkpointing"))
    if wanted and arguments.adapter.kind() == "prefix":
        return False, [
            "--gradient_checkpointing is off: prefix tuning hands each layer a cache, which checkpointing would drop"
        ]
    if wanted and not checked.can_checkpoint:
        return False, ["--gradient_checkpointing is off: this model's code does not support it"]
    return wanted, _checkpointing_advice(arguments) if wanted else []


def checkpointing_options(arguments: Arguments) -> tuple[int, bool]:
    """Which layers are checkpointed, each n-th, and whether what they keep waits in host memory.

    Raises:
        ConfigError: not a JSON object of numbers and booleans.
    """
    given = arguments.given("activation_checkpointing_kwargs") or "{}"
    try:
        options = json.loads(given)
        every, offload = int(options.get("every_n_layers", 1)), bool(options.get("offload", False))
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            f'--activation_checkpointing_kwargs {given}: expected a JSON object such as {{"every_n_layers": 2}}'
        ) from None
    return every, offload


def _checkpointing_advice(arguments: Arguments) -> list[str]:
    """When the options that were given pay."""
    every, offload = checkpointing_options(arguments)
    lines = []
    if every > 1:
        lines.append(
            f"activations of one layer in {every} are checkpointed, those of the others are kept: faster where memory "
            "is left, by at most a quarter of a step"
        )
    if offload:
        lines.append(
            "checkpointed activations wait in host memory: for conversations so long that their activations do not "
            "fit otherwise; each goes to the host and back in every step"
        )
    return lines
