"""What to change where a run does not fit: the least costly of what does, by `estimate` itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from finetune.preflight.memory.memory_estimate import MemoryEstimate, estimate_memory
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

# How many times as long a step takes, roughly; what orders the changes, not a promise. Recomputing is a third pass
# beside two. ZeRO-3 and smaller micro-batches gather or start more often. An offloaded update waits for the host.
RECOMPUTING, HALVED, HALVED_ZERO3, STAGE_2, STAGE_3, OFFLOADED, ALL_OFFLOADED = 1.33, 1.04, 1.15, 1.02, 1.2, 2.0, 3.0
# Adapters cost no speed, but they learn something else; more ranks neither, but somebody has to pay for them.
ADAPTERS, DOUBLED = 1.5, 1.6
WANTED = 3


@dataclass(frozen=True)
class Suggestion:
    """Flags to type instead, and what comes of them.

    Attributes:
        flags: name and value, as on the command line. words: the same for a reader.
        slower: how many times as long a step takes, roughly.
    """

    flags: tuple[str, ...]
    words: str
    slower: float
    shape: ModelSpec
    job: RunSpec
    estimate: MemoryEstimate


@dataclass(frozen=True)
class _Step:
    flags: dict[str, str]
    words: str
    slower: float
    shape: ModelSpec
    job: RunSpec


def suggest_changes(
    shape: ModelSpec,
    job: RunSpec,
    device_bytes: float,
    host_bytes: float | None = None,
    *,
    with_adapter: ModelSpec | None = None,
    most_ranks: int | None = None,
) -> tuple[Suggestion, ...]:
    """Up to three changes after which the run fits, the one that costs least speed first; behind them of two at
    once, where too few single ones are enough. Empty: nothing of what is tried fits.

    Args:
        device_bytes: of a GPU; on a CPU what the process of a rank may grow by. host_bytes: of a host; None: not asked.
        with_adapter: the same model with LoRA; None: that is not tried.
        most_ranks: how many there could be; None: up to eight times as many.
    """
    ranks = 8 * job.ranks if most_ranks is None else most_ranks
    start = _Step({}, "", 1.0, shape, job)
    single = list(_steps(start, with_adapter, ranks))
    found = _fitting(single, device_bytes, host_bytes)
    if len(found) < WANTED:
        enough = [frozenset(change.flags[::2]) for change in found]
        double = [second for first in single for second in _steps(first, with_adapter, ranks)]
        double = [one for one in double if not any(kind <= one.flags.keys() for kind in enough)]
        found += _fitting(double, device_bytes, host_bytes)
    return tuple(found[:WANTED])


def _fitting(steps: list[_Step], device_bytes: float, host_bytes: float | None) -> list[Suggestion]:
    """Cheapest first. Of those that do the same kind of thing the cheapest alone, so that three differ."""
    found: dict[frozenset[str], Suggestion] = {}
    seen: set[tuple[ModelSpec, RunSpec]] = set()
    for step in sorted(steps, key=lambda step: step.slower):
        kind = frozenset(step.flags)
        if kind in found or (step.shape, step.job) in seen:
            continue
        seen.add((step.shape, step.job))
        needed = estimate_memory(step.shape, step.job)
        if needed.fits(device_bytes, host_bytes):
            flags = tuple(word for name, value in step.flags.items() for word in (name, value))
            found[kind] = Suggestion(flags, step.words, step.slower, step.shape, step.job, needed)
    return list(found.values())


def _steps(start: _Step, with_adapter: ModelSpec | None, most_ranks: int) -> Iterator[_Step]:
    """Every single change from here."""
    job = start.job
    if not job.checkpoint_every:
        yield _then(
            start, {"--gradient_checkpointing": "True"}, "recompute activations", RECOMPUTING, checkpoint_every=1
        )
    yield from _smaller_batches(start)
    yield from _stages(start)
    yield from _offloads(start)
    if with_adapter is not None and not start.shape.adapter:
        yield _then(start, {"--use_lora": "True"}, "train LoRA adapters alone", ADAPTERS, shape=with_adapter)
    yield from _more_ranks(start, most_ranks)


def _then(
    start: _Step, flags: dict[str, str], words: str, slower: float, *, shape: ModelSpec | None = None, **changed: object
) -> _Step:
    return _Step(
        {**start.flags, **flags},
        f"{start.words}, {words}" if start.words else words,
        start.slower * slower,
        start.shape if shape is None else shape,
        replace(start.job, **changed),
    )


def _smaller_batches(start: _Step) -> Iterator[_Step]:
    """As many rows a step in smaller micro-batches."""
    job = start.job
    halvings = 0
    for rows in range(job.rows - 1, 0, -1):
        if job.rows % rows:
            continue
        halvings += 1
        parts = job.rows // rows
        tokens = max(-(-job.tokens // parts), min(job.longest, job.tokens))
        yield _then(
            start,
            {
                "--per_device_train_batch_size": str(rows),
                "--gradient_accumulation_steps": str(job.accumulation * parts),
            },
            f"{rows} rows a micro-batch and {job.accumulation * parts} of them a step",
            (HALVED_ZERO3 if job.stage == 3 else HALVED) ** halvings,
            rows=rows,
            accumulation=job.accumulation * parts,
            tokens=tokens,
            learned=min(job.learned, tokens),
        )


def _stages(start: _Step) -> Iterator[_Step]:
    """Higher stages of ZeRO, which split more; a single rank has nobody to split with."""
    job = start.job
    if job.ranks == 1 or job.offload_optimizer != "none":
        return
    for stage, slower in ((1, 1.0), (2, STAGE_2), (3, STAGE_3)):
        if stage > (job.stage or 0):
            bucket = None if stage == 3 else 500_000_000
            words = f"ZeRO stage {stage}"
            yield _then(start, {"--deepspeed": f"zero{stage}"}, words, slower, stage=stage, reduce_bucket=bucket)


def _offloads(start: _Step) -> Iterator[_Step]:
    job = start.job
    if job.use_cpu:  # its memory is the host's already
        return
    if job.stage != 3 and job.offload_optimizer == "none":
        yield _then(
            start,
            {"--deepspeed": "zero2_offload"},
            "optimizer states in host memory",
            OFFLOADED,
            stage=2,
            reduce_bucket=500_000_000,
            offload_optimizer="cpu",
        )
    if job.offload_parameters == "none":
        yield _then(
            start,
            {"--deepspeed": "zero3_offload"},
            "optimizer states and parameters in host memory",
            ALL_OFFLOADED,
            stage=3,
            reduce_bucket=None,
            offload_optimizer="cpu",
            offload_parameters="cpu",
        )


def _more_ranks(start: _Step, most_ranks: int) -> Iterator[_Step]:
    """More ranks, each with less of the same step: on the one host, or on more of them with as many each."""
    job = start.job
    for times in (2, 4, 8):
        ranks = job.ranks * times
        if ranks > most_ranks or job.accumulation % times:
            continue
        where = {"--num_gpus": str(ranks)} if job.on_host == job.ranks else {"--hostfile": f"one with {ranks} slots"}
        yield _then(
            start,
            {**where, "--gradient_accumulation_steps": str(job.accumulation // times)},
            f"{ranks} ranks instead of {job.ranks}",
            DOUBLED,
            ranks=ranks,
            accumulation=job.accumulation // times,
        )
