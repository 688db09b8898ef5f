"""Checks of batches, memory and disk: what the run needs against what its hosts have."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.config import AdapterArguments
from finetune.config.run_config import BatchConfig, RunConfig, ScheduleConfig
from finetune.dataset.prepare import PreparedData
from finetune.dataset.sampler import Sampler
from finetune.models import loader
from finetune.models.adapters import attach_adapter
from finetune.models.loader import ModelInfo
from finetune.models.model_folder import stored_bytes
from finetune.preflight import memory
from finetune.preflight.doctor_report import DoctorReport
from finetune.preflight.host_checks import Answers
from finetune.preflight.memory import MemoryEstimate, ModelSpec, RunSpec, Suggestion
from finetune.preflight.spec_from_config import spec_from_config
from finetune.training.dataloaders import BatchLayout, decide_layout, train_sampler
from finetune.training.flag_checks import ADAM_BYTES, optimizer_state_bytes
from finetune.utils.console import labelled, size
from finetune.utils.errors import FinetuneError, StorageError

# In a longer epoch only the micro-batches of its first steps are looked at.
MAX_STEPS, FIRST_STEPS = 400, 3
OUT_OF_MEMORY_STATUS = 1  # exit status of a run that runs out of memory


@dataclass(frozen=True)
class LargestBatch:
    """The most rows, tokens (padding included) and logits of any micro-batch of a rank."""

    rows: int = 0
    tokens: int = 0
    logits: int = 0


@dataclass(frozen=True)
class BatchForecast:
    """How conversations become micro-batches."""

    layout: BatchLayout
    sampler: Sampler
    largest: LargestBatch  # of an epoch
    first: LargestBatch  # of its first three steps, which a short trial run sees
    longest: int  # tokens of the longest example
    steps: int  # of the whole run

    def facts(self, batch: BatchConfig) -> dict[str, Any]:
        """Return JSON values: the arithmetic of a step, written out."""
        shape, sampler = self.sampler.shape, self.sampler
        sharing = batch.sequence_parallel_size
        units = "examples" if sampler.capacity is None else f"groups of up to {sampler.capacity:,} tokens"
        ranks = f"{batch.world_size} ranks" if sharing == 1 else f"{shape.world_size} groups of {sharing} ranks"
        tokens = int(sampler.lengths.sum())
        return {
            "arithmetic": f"{shape.per_device_batch} per device x {shape.accumulation} accumulated x {ranks} = "
            f"{shape.step_size} {units}",
            "batching": sampler.batching,
            "examples": len(sampler.lengths),
            "units": sampler.num_units,
            "steps_per_epoch": sampler.steps_per_epoch,
            "steps": self.steps,
            "tokens_per_step": round(tokens * min(1.0, shape.step_size / max(sampler.num_units, 1))),
            "largest_micro_batch": asdict(self.largest),
            "largest_of_the_first_steps": asdict(self.first),
            "longest_example": self.longest,
            "selects_logits": self.layout.selects_logits,
        }


def forecast_batches(
    batch: BatchConfig, schedule: ScheduleConfig, data: PreparedData, *, obstacle: str | None
) -> BatchForecast:
    """Form the micro-batches of the first epoch; `obstacle` says why the model cannot run padding-free batches."""
    from finetune.dataset.prepared_cache import int_column

    examples = data.epoch(batch.seed).examples
    lengths, supervised = int_column(examples, "length"), int_column(examples, "num_supervised")
    longest = int(lengths.max())
    layout = decide_layout(batch, longest, batch.padding_reason or obstacle)
    sampler = train_sampler(batch, layout, lengths)
    largest = first = np.zeros(3, dtype=int)
    for step in range(min(sampler.steps_per_epoch, MAX_STEPS)):
        for number in range(sampler.micro_batches(step)):
            for rank in range(sampler.shape.world_size):
                rows = sampler.micro_batch(0, step, rank, number)
                if len(rows):
                    is_padded = sampler.batching == "padded"
                    shape = np.full(len(rows), lengths[rows].max()) if is_padded else lengths[rows].astype(int)
                    sizes = (len(rows), shape.sum(), supervised[rows].sum())
                    largest = np.maximum(largest, sizes)
        first = largest if step < FIRST_STEPS else first
    steps = schedule.max_steps
    if steps <= 0:  # as the Trainer counts
        steps = int(np.ceil(schedule.num_train_epochs * sampler.steps_per_epoch))
    of_epoch, of_first_steps = LargestBatch(*largest.tolist()), LargestBatch(*first.tolist())
    return BatchForecast(layout, sampler, of_epoch, of_first_steps, longest, steps)


@dataclass(frozen=True)
class FreeSpace:
    """Bytes on the hosts: of each device (None: unknown), memory of the fullest host, disk of --output_dir by host."""

    device: float | None
    host: float
    disks: dict[str, float]

    def holds(self, estimate: MemoryEstimate) -> bool:
        """Return whether device and host memory suffice."""
        return estimate.fits(math.inf if self.device is None else self.device, self.host)


def check_resources(
    report: DoctorReport,
    run: RunSpec,
    first_batch: LargestBatch,
    free: FreeSpace,
    info: ModelInfo,
    tokenizer: Any,
    adapter: AdapterArguments,
) -> None:
    """Check memory of devices and hosts, and disks.

    Args:
        first_batch: the largest micro-batch of the first steps.
    """
    try:
        model = _model_spec(info, tokenizer, run, adapter)
    except FinetuneError as error:
        report.add_error("configuration", str(error), status=error.status)
        return
    except ValueError as error:
        report.warn("memory", f"not estimated: {error}")
        return
    estimate = memory.estimate_memory(model, run)
    other = memory.estimate_memory(model, replace(run, checkpoint_every=0 if run.checkpoint_every else 1))
    first = memory.estimate_memory(model, replace(run, **asdict(first_batch)))
    facts: dict[str, Any] = {"fits": free.holds(estimate), **estimate.facts()}
    facts["device"] |= {
        "capacity": free.device,
        "total_in_the_first_steps": round(first.device_total),
        "checkpointing": bool(run.checkpoint_every),
        "total_with_the_other_checkpointing": round(other.device_total),
    }
    facts["host"]["free"] = free.host if free.disks else None
    facts["disk"]["free"] = free.disks
    facts |= {"parameters": model.parameters, "trainable": model.trainable}
    facts["lines"] = labelled(_lines(model, run, estimate, free, other=other.device_total, first=first.device_total))
    report.facts["memory"] = facts
    if not facts["fits"]:
        with_adapter = None
        if adapter.kind() is None:
            with_adapter = _model_spec(info, tokenizer, run, AdapterArguments(use_lora=True))
        device = math.inf if free.device is None else free.device
        changes = memory.suggest_changes(model, run, device, free.host, with_adapter=with_adapter)
        _add_memory_error(report, estimate, free, changes)
    _check_disks(report, estimate, free, saves=run.keep_checkpoints != 0)


def note_batches(report: DoctorReport, batch: BatchConfig, batches: BatchForecast) -> None:
    """Add the batches to the facts about the configuration."""
    facts = batches.facts(batch)
    lines = {
        "step": f"{facts['arithmetic']}, about {facts['tokens_per_step']:,} tokens",
        "length": f"{facts['steps']:,} steps, {facts['steps_per_epoch']:,} per epoch",
    }
    configuration = report.facts["configuration"]
    configuration["batches"] = facts
    configuration["lines"] += [*labelled(lines), *(f"note: {note}" for note in batches.layout.notes)]


def _model_spec(info: ModelInfo, tokenizer: Any, run: RunSpec, adapter: AdapterArguments) -> ModelSpec:
    grows = loader.needs_new_embeddings(info, tokenizer)

    def attach(base: Any) -> Any:
        return attach_adapter(base, adapter, info, tokenizer, computes_initial=False)

    return spec_from_config(
        info.config,
        precision=run.precision,
        attach=attach,
        vocabulary=loader.embedding_rows(tokenizer) if grows else None,
        stored_bytes=stored_bytes(Path(info.name).expanduser()),
        bits=info.bits,
        trust_remote_code=info.trusts_code,
        keeps_scores=run.padded and info.attention == "eager",
    )


def run_spec(config: RunConfig, batches: BatchForecast, *, ranks_on_host: int) -> RunSpec:
    """Return the run as the numbers of the estimate, with the sizes that DeepSpeed gets."""
    recompute, hardware = config.activation_checkpointing, config.hardware
    return RunSpec(
        **memory.from_deepspeed(config.deepspeed.config if config.deepspeed else None),
        ranks=config.batch.world_size,
        ranks_on_host=ranks_on_host,
        **asdict(batches.largest),
        flash_attention=hardware.attention.startswith("flash"),
        longest=batches.longest,
        padded=batches.layout.batching == "padded",
        precision=hardware.precision,
        use_cpu=hardware.use_cpu,
        checkpoint_every=recompute.every_n_layers if recompute.enabled else 0,
        checkpoints_to_host=recompute.enabled and recompute.offload,
        accumulation=config.batch.accumulation,
        optimizer_bytes=_state_bytes(config),
        keep_checkpoints=_kept_checkpoints(config.schedule, batches),
        only_model=config.schedule.save_only_model,
    )


def _state_bytes(config: RunConfig) -> float:
    """Return the bytes of optimizer states for each trained parameter."""
    section = config.deepspeed.config.get("optimizer") if config.deepspeed else None
    if section is None:
        return optimizer_state_bytes(config.training_values(), partitions=config.deepspeed is not None)
    return 4.0 if str(section.get("type")).lower() in ("lion", "adagrad") else ADAM_BYTES


def _kept_checkpoints(schedule: ScheduleConfig, batches: BatchForecast) -> int:
    """Return how many checkpoints there are at the end: those saved, at most --save_total_limit."""
    if schedule.save_strategy == "no":
        return 0
    every: float = max(batches.sampler.steps_per_epoch, 1)
    if schedule.save_strategy == "steps":
        every = schedule.save_steps
        every = every if every >= 1 else max(1, round(every * batches.steps))
    saved, limit = math.ceil(batches.steps / every), schedule.save_total_limit
    return min(saved, limit) if limit and limit > 0 else saved


def free_space(use_cpu: bool, answers: Answers) -> FreeSpace:
    """Collect what the hosts said of their memory and disks."""
    disks = {host: facts["space"]["output"]["free"] for host, facts in answers.items()}
    host = min((facts["memory"]["available"] for facts in answers.values()), default=math.inf)
    gpus = [gpu["memory"] for facts in answers.values() for gpu in facts["gpu_facts"]]
    is_known = bool(gpus) and all(gpus)  # nvidia-smi reports none of a GPU that shares the host's memory
    return FreeSpace(min(gpus) if is_known and not use_cpu else None, host, disks)


def _lines(
    model: ModelSpec, run: RunSpec, estimate: MemoryEstimate, free: FreeSpace, *, other: float, first: float
) -> dict[str, str]:
    """Return the estimate as text by label.

    `other` and `first` are bytes of a device: with checkpointing switched over, and in the first steps.
    """
    largest_first = sorted(estimate.device.items(), key=lambda part: -part[1])
    parts = [f"{name} {size(value)}" for name, value in largest_first if value >= 0.01 * estimate.device_total]
    of = "" if free.device is None else f" of {size(free.device)}"
    free_disk = f"; {size(min(free.disks.values()))} free" if free.disks else ""  # else no host has answered
    kept = "" if estimate.kept is None or not run.keep_checkpoints else f"; at most {size(estimate.kept)} in total"
    return {
        "trained": f"{model.trainable:,} of {model.parameters:,} parameters"
        + (f", {model.quantizable:,} of them in {model.bits} bits" if model.bits else ""),
        "largest": f"{run.tokens:,} tokens in a rank's largest micro-batch, {run.logits:,} of them with logits",
        "each rank" if run.use_cpu else "each GPU": ("grows by " if run.use_cpu else "")
        + f"{size(estimate.device_total)}{of}, peak in the {estimate.phase}",
        "": ", ".join(parts),
        " ": f"{size(first)} in the first three steps; {size(other)} "
        + f"{'without' if run.checkpoint_every else 'with'} activation checkpointing",
        "each host": f"{size(estimate.host_loading)} while loading, {size(estimate.host_training)} while training, "
        f"{size(estimate.host_saving)} while saving" + (f"; {size(free.host)} free" if free.disks else ""),
        "disk": f"{size(estimate.checkpoint_total)} per checkpoint, {size(estimate.result)} for the result{kept}"
        + free_disk,
    }


def _add_memory_error(
    report: DoctorReport, estimate: MemoryEstimate, free: FreeSpace, changes: tuple[Suggestion, ...]
) -> None:
    """Report what is missing, and the changes that make the run fit."""
    if free.device is not None and estimate.device_total > free.device:
        text = f"each GPU needs {size(estimate.device_total)} and has {size(free.device)}"
    else:
        text = f"a host needs {size(estimate.host_total)} of memory and has {size(free.host)} free"
    report.facts["memory"]["changes"] = [
        {"flags": list(change.flags), "words": change.words, "slower": change.slower}
        | {"device": round(change.estimate.device_total), "host": round(change.estimate.host_total)}
        for change in changes
    ]
    text += "; the fastest changes that make it fit:" if changes else "; no change that was tried makes it fit"
    for change in changes:
        text += f"\n     {' '.join(change.flags)}: {change.words}, {size(change.estimate.device_total)} each, "
        text += f"a step takes about {change.slower:.2f} times as long"
    report.add_error("memory", text, status=OUT_OF_MEMORY_STATUS)


def _check_disks(report: DoctorReport, estimate: MemoryEstimate, free: FreeSpace, *, saves: bool) -> None:
    needed = estimate.kept if saves else estimate.result
    if needed is None:
        needed = estimate.result + estimate.checkpoint_total
        text = "every checkpoint is kept: set --save_total_limit, or make sure that the disk is large enough"
        report.warn("disk", f"{size(estimate.checkpoint_total)} per checkpoint, {text}")
    for host, disk in free.disks.items():
        if disk < needed:
            text = (
                f"the disk of --output_dir has {size(disk)} free, a run writes up to {size(needed)}: free some space, "
                "--save_total_limit, or set --save_only_model True"
            )
            report.add_error("disk", text, status=StorageError.status, host=host)
