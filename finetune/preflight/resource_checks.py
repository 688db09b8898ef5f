"""What a run needs of memory and disk, beside what its hosts have."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.run_config import BatchConfig, RunConfig, ScheduleConfig
from finetune.dataset.prepare import PreparedData
from finetune.models import loader
from finetune.models.adapters import attach_adapter
from finetune.models.attention import forward_takes_logits_to_keep, unsupported_config_reason
from finetune.models.loader import ModelInfo
from finetune.preflight import memory
from finetune.preflight.batch_forecast import BatchForecast, forecast_batches
from finetune.preflight.doctor_output import size
from finetune.preflight.findings import DoctorReport
from finetune.preflight.host_checks import Answers
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec
from finetune.preflight.spec_from_config import spec_from_config
from finetune.utils.console import labelled
from finetune.utils.errors import FinetuneError, StorageError

STATUS_OF_NO_MEMORY = 1  # what a run that runs out of it ends with


@dataclass(frozen=True)
class Room:
    """Bytes that the hosts have: each device (None: not known), the memory of the fullest host, the output's disk."""

    device: float | None
    host: float
    disks: dict[str, float]


def examine_resources(
    examination: DoctorReport,
    config: RunConfig,
    info: ModelInfo,
    tokenizer: Any,
    data: PreparedData,
    slots: dict[str, list[int]],
    answers: Answers,
) -> None:
    """Batches and steps, then bytes: of each device, each host's memory, each disk."""
    obstacle = unsupported_config_reason(info.config, data.longest)
    selects = forward_takes_logits_to_keep(info.model_class)
    batches = examination.attempt(
        "configuration",
        lambda: forecast_batches(config.batch, config.schedule, data, selects_logits=selects, obstacle=obstacle),
    )
    if batches is None:
        return
    _note_batches(examination, config.batch, batches)
    room = _room(config.hardware.use_cpu, slots, answers)
    try:
        shape = _shape(config, info, tokenizer)
    except FinetuneError as error:
        examination.add_error("configuration", str(error), status=error.status)
        return
    except ValueError as error:
        examination.warn("memory", f"not foreseen: {error}")
        return
    job = job_of(config, batches, ranks_on_host=max(map(len, slots.values())))
    found = memory.estimate_memory(shape, job)
    other = memory.estimate_memory(shape, replace(job, checkpoint_every=0 if job.checkpoint_every else 1))
    first = memory.estimate_memory(shape, replace(job, **asdict(batches.first)))
    facts = _facts(shape, job, found, room, other=other, first=first)
    examination.facts["memory"] = facts
    if not facts["fits"]:
        _mend_memory(examination, config, info, tokenizer, shape, job, found, room)
    _examine_disks(examination, found, room, saves=job.keep_checkpoints != 0)


def _note_batches(examination: DoctorReport, batch: BatchConfig, batches: BatchForecast) -> None:
    facts: dict[str, Any] = batches.facts(batch)
    configuration = examination.facts["configuration"]
    configuration["batches"] = facts
    lines = {
        "step": f"{facts['arithmetic']}, about {facts['tokens_per_step']:,} tokens",
        "length": f"{facts['steps']:,} steps, {facts['steps_per_epoch']:,} an epoch",
    }
    configuration["lines"] += [*labelled(lines), *(f"note: {note}" for note in batches.form.notes)]


def _shape(config: RunConfig, info: ModelInfo, tokenizer: Any, *, adapter: bool | None = None) -> ModelSpec:
    """The model that is trained; `adapter`: with one, whatever the flags say."""
    grows = loader.needs_new_embeddings(info, tokenizer)
    attach = None
    if config.adapter.kind() is not None or adapter:
        given = config.adapter if config.adapter.kind() is not None else replace(config.adapter, use_lora=True)

        def attach(base: Any) -> Any:
            return attach_adapter(base, given, base_revision=info.revision, grows=grows, computes_initial=False)

    return spec_from_config(
        info.config,
        precision=config.hardware.precision,
        attach=attach,
        vocabulary=loader.embedding_rows(tokenizer) if grows else None,
        stored_bytes=loader.stored_bytes(Path(info.name).expanduser()),
        trust_remote_code=config.model.trusts_code(),
    )


def job_of(config: RunConfig, batches: BatchForecast, *, ranks_on_host: int) -> RunSpec:
    """The run in the planner's numbers; its sizes are those that DeepSpeed gets."""
    recompute = config.activation_checkpointing
    return RunSpec(
        **memory.from_deepspeed(config.deepspeed.config if config.deepspeed else None),
        ranks=config.batch.world_size,
        ranks_on_host=ranks_on_host,
        **asdict(batches.largest),
        longest=batches.longest,
        padded=batches.form.batching == "padded",
        precision=config.hardware.precision,
        use_cpu=config.hardware.use_cpu,
        checkpoint_every=recompute.every_n_layers if recompute.enabled else 0,
        checkpoints_to_host=recompute.enabled and recompute.offload,
        accumulation=config.batch.accumulation,
        keep_checkpoints=_checkpoints(config.schedule, batches),
        only_model=config.schedule.save_only_model,
    )


def _checkpoints(schedule: ScheduleConfig, batches: BatchForecast) -> int:
    """How many lie there at the end: those that are made, and of them at most --save_total_limit."""
    strategy, every = schedule.save_strategy, schedule.save_steps
    if strategy == "no":
        return 0
    made = math.ceil(batches.steps / max(batches.sampler.steps_per_epoch, 1))
    if strategy == "steps":
        made = math.ceil(batches.steps / (every if every >= 1 else max(1, round(every * batches.steps))))
    limit = schedule.save_total_limit
    return min(made, limit) if limit and limit > 0 else made


def _room(use_cpu: bool, slots: dict[str, list[int]], answers: Answers) -> Room:
    disks = {host: facts["space"]["output"]["free"] for host, facts in answers.items()}
    free = min((facts["memory"]["available"] for facts in answers.values()), default=math.inf)
    if use_cpu:
        return Room(None, free, disks)
    gpus = [one["memory"] for host, facts in answers.items() for one in facts["gpu_facts"][: len(slots[host])]]
    return Room(min(gpus) if gpus else None, free, disks)


def _facts(
    shape: ModelSpec,
    job: RunSpec,
    found: memory.MemoryEstimate,
    room: Room,
    *,
    other: memory.MemoryEstimate,
    first: memory.MemoryEstimate,
) -> dict[str, Any]:
    """As JSON, and as lines.

    `other` has activation checkpointing where the run has none, and none where it has; `first` is of its first steps.
    """
    fits = found.host_total <= room.host and (room.device is None or found.device_total <= room.device)
    biggest = sorted(found.device.items(), key=lambda one: -one[1])
    grows, how = "grows by " if job.use_cpu else "", "without" if job.checkpoint_every else "with"
    of = "" if room.device is None else f" of {size(room.device)}"
    parts = ", ".join(f"{name} {size(value)}" for name, value in biggest if value >= 0.01 * found.device_total)
    kept = "" if found.kept is None or not job.keep_checkpoints else f"; at most {size(found.kept)} in all"
    lines = {
        "trained": f"{shape.trainable:,} of {shape.parameters:,} parameters",
        "largest": f"{job.tokens:,} tokens in a rank's largest micro-batch, {job.logits:,} of them get logits",
        "each rank" if job.use_cpu else "each GPU": f"{grows}{size(found.device_total)}{of}, most in the {found.phase}",
        "": parts,
        " ": f"{size(first.device_total)} in the first three steps; {size(other.device_total)} {how} checkpointing",
        "each host": f"{size(found.host_loading)} while loading, {size(found.host_training)} while training, "
        f"{size(found.host_saving)} while saving" + (f"; {size(room.host)} are free" if room.disks else ""),
        "disk": f"{size(found.checkpoint_total)} a checkpoint, {size(found.result)} the result{kept}; "
        f"{size(min(room.disks.values(), default=0))} are free",
    }
    return {
        "fits": fits,
        "device": {
            "parts": {name: round(value) for name, value in found.device.items()},
            "total": round(found.device_total), "phase": found.phase, "capacity": room.device,
            "total_in_the_first_steps": round(first.device_total),
            "checkpointing": bool(job.checkpoint_every),
            "total_with_the_other_checkpointing": round(other.device_total),
            "by_phase": {name: round(value) for name, value in found.by_phase.items()},
        },
        "host": {
            "loading": round(found.host_loading), "training": round(found.host_training),
            "saving": round(found.host_saving), "free": room.host if room.disks else None,
        },
        "disk": {
            "checkpoint": {name: round(value) for name, value in found.checkpoint.items()},
            "result": round(found.result), "kept": None if found.kept is None else round(found.kept),
            "free": room.disks,
        },
        "parameters": shape.parameters,
        "trainable": shape.trainable,
        "lines": labelled(lines),
    }  # fmt: skip


def _mend_memory(
    examination: DoctorReport,
    config: RunConfig,
    info: ModelInfo,
    tokenizer: Any,
    shape: ModelSpec,
    job: RunSpec,
    found: memory.MemoryEstimate,
    room: Room,
) -> None:
    """Say by how much it does not fit, and the cheapest changes that make it fit."""
    adapter = None
    if config.adapter.kind() is None:
        adapter = _shape(config, info, tokenizer, adapter=True)
    device = math.inf if room.device is None else room.device
    changes = memory.suggest_changes(shape, job, device, room.host, with_adapter=adapter)
    if room.device is not None and found.device_total > room.device:
        text = f"each GPU needs {size(found.device_total)} and has {size(room.device)}"
    else:
        text = f"a host needs {size(found.host_total)} of memory and has {size(room.host)} free"
    facts = [
        {"flags": list(one.flags), "words": one.words, "slower": one.slower, "device": round(one.estimate.device_total),
         "host": round(one.estimate.host_total)}
        for one in changes
    ]  # fmt: skip
    examination.facts["memory"]["changes"] = facts
    shown = [
        f"\n     {' '.join(one.flags)}: {one.words}, {size(one.estimate.device_total)} each, "
        f"about {one.slower:.2f} times as long a step"
        for one in changes
    ]
    advice = "; the cheapest changes that make it fit:" + "".join(shown) if shown else "; nothing that was tried fits"
    examination.add_error("memory", text + advice, status=STATUS_OF_NO_MEMORY)


def _examine_disks(examination: DoctorReport, found: memory.MemoryEstimate, room: Room, *, saves: bool) -> None:
    needed = found.result if not saves else found.kept
    if needed is None:
        needed = found.result + found.checkpoint_total
        text = "every checkpoint is kept: give --save_total_limit, or see that the disk is large enough"
        examination.warn("disk", f"{size(found.checkpoint_total)} each, {text}")
    for host, free in room.disks.items():
        if free < needed:
            text = (
                f"the disk of --output_dir has {size(free)} free, a run writes up to {size(needed)}: make room, lower "
                "--save_total_limit, or take --save_only_model True"
            )
            examination.add_error("disk", text, status=StorageError.status, host=host)
