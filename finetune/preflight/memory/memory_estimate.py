"""The memory and disk estimate of a run, and changes that make it fit, the least costly first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from finetune.preflight.memory import host_and_disk
from finetune.preflight.memory.device_memory import NAMES, Parts, cpu_phases, gpu_phases
from finetune.preflight.memory.host_and_disk import cpu_hosts, gpu_hosts
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec

# Rough factors on the time of a step, which order the changes. Recomputing is a third pass beside two. Smaller
# micro-batches gather or start more often. An offloaded update waits for the host.
RECOMPUTING, HALVED, HALVED_ZERO3 = 1.33, 1.04, 1.15
STAGES = {1: 1.0, 2: 1.02, 3: 1.2}
OFFLOADED, ALL_OFFLOADED = 2.0, 3.0
# Adapters cost no time, but they train something else. More ranks cost no time, but hardware.
# Packed weights are unpacked for each product.
ADAPTERS, DOUBLED, FOUR_BITS = 1.5, 1.6, 1.7
MAX_SUGGESTIONS = 3
BUCKET = 500_000_000  # elements, of the shipped configs for stages 1 and 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a device, of the fullest host with all its ranks (on a CPU their whole processes), and on disk."""

    device: Parts  # of one rank by part at its peak, in `phase`; on a CPU: the growth of its process
    phase: str
    by_phase: dict[str, float]  # the total in every phase
    host_loading: float
    host_training: float
    host_saving: float
    checkpoint: Parts  # of one checkpoint by part, all ranks together
    result: float  # of the trained model or adapter
    kept: float | None  # of the output folder at most; None: it grows with each checkpoint

    @property
    def device_total(self) -> float:
        """Bytes that a GPU needs, or by which a CPU rank's process grows."""
        return sum(self.device.values())

    @property
    def host_total(self) -> float:
        """Bytes that the fullest host needs."""
        return max(self.host_loading, self.host_training, self.host_saving)

    @property
    def checkpoint_total(self) -> float:
        """Bytes of one checkpoint."""
        return sum(self.checkpoint.values())

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return JSON values: bytes by place."""
        hosts = {"loading": self.host_loading, "training": self.host_training, "saving": self.host_saving}
        kept = None if self.kept is None else round(self.kept)
        return {
            "device": {
                "parts": _rounded(self.device),
                "total": round(self.device_total),
                "phase": self.phase,
                "by_phase": _rounded(self.by_phase),
            },
            "host": _rounded(hosts),
            "disk": {"checkpoint": _rounded(self.checkpoint), "result": round(self.result), "kept": kept},
        }

    def fits(self, device_bytes: float, host_bytes: float | None = None) -> bool:
        """Whether it fits into the device and, if given, into the host."""
        return self.device_total <= device_bytes and (host_bytes is None or self.host_total <= host_bytes)


def _rounded(parts: Parts) -> dict[str, int]:
    return {name: round(value) for name, value in parts.items()}


def estimate_memory(model: ModelSpec, run: RunSpec) -> MemoryEstimate:
    """Estimate what a run takes of memory and disk; a ValueError names what DeepSpeed would refuse."""
    if run.stage not in (None, 0, 1, 2, 3):
        raise ValueError(f"stage {run.stage}: expected None, 0, 1, 2 or 3")
    if run.offload_parameters != "none" and run.stage != 3:
        raise ValueError(f"offload_parameters needs stage 3, not {run.stage}")
    phases = cpu_phases(model, run) if run.use_cpu else gpu_phases(model, run)
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    peak = max(totals, key=totals.__getitem__)
    parts = phases[peak]
    names = (*NAMES, *(name for name in parts if name not in NAMES))
    loading, training, saving = cpu_hosts(model, run, totals) if run.use_cpu else gpu_hosts(model, run)
    return MemoryEstimate(
        device={name: parts[name] for name in names if parts.get(name)},
        phase=peak,
        by_phase=totals,
        host_loading=loading,
        host_training=training,
        host_saving=saving,
        checkpoint=host_and_disk.checkpoint(model, run),
        result=host_and_disk.result(model, run),
        kept=host_and_disk.kept(model, run),
    )


@dataclass(frozen=True)
class Suggestion:
    """Flags to change, and the run that comes of it."""

    changes: dict[str, str]  # value by flag name
    words: str  # the same for a reader
    slower: float  # rough factor on the time of a step
    model: ModelSpec
    run: RunSpec

    @property
    def flags(self) -> tuple[str, ...]:
        """Names and values, as on the command line."""
        return tuple(word for change in self.changes.items() for word in change)

    @cached_property
    def estimate(self) -> MemoryEstimate:
        """What the changed run needs."""
        return estimate_memory(self.model, self.run)

    def then(
        self, changes: dict[str, str], words: str, slower: float, *, model: ModelSpec | None = None, **fields: Any
    ) -> Suggestion:
        """Return this suggestion with one more change, to the model or to `fields` of the run."""
        return Suggestion(
            {**self.changes, **changes},
            f"{self.words}, {words}" if self.words else words,
            self.slower * slower,
            model or self.model,
            replace(self.run, **fields),
        )


def suggest_changes(
    model: ModelSpec,
    run: RunSpec,
    device_bytes: float,
    host_bytes: float | None = None,
    *,
    with_adapter: ModelSpec | None = None,
) -> tuple[Suggestion, ...]:
    """Return up to three changes after which the run fits, the fastest first, then pairs of changes.

    Args:
        device_bytes: of a GPU; on a CPU what the process of a rank may grow by.
        host_bytes: of a host; None: not checked.
        with_adapter: the same model with LoRA; None: LoRA is not suggested.
    """
    ranks = 8 * run.ranks
    single = list(_single_changes(Suggestion({}, "", 1.0, model, run), with_adapter, ranks))
    found = _fitting(single, device_bytes, host_bytes)
    if len(found) < MAX_SUGGESTIONS:
        enough = [change.changes.keys() for change in found]
        pairs = (second for first in single for second in _single_changes(first, with_adapter, ranks))
        pairs = (pair for pair in pairs if not any(kind <= pair.changes.keys() for kind in enough))
        found += _fitting(pairs, device_bytes, host_bytes)
    return tuple(found[:MAX_SUGGESTIONS])


def _fitting(suggestions: Iterable[Suggestion], device_bytes: float, host_bytes: float | None) -> list[Suggestion]:
    """Return those that fit, the fastest first; of several that change the same flags only the fastest."""
    found: dict[frozenset[str], Suggestion] = {}
    seen = set()
    for suggestion in sorted(suggestions, key=lambda suggestion: suggestion.slower):
        kind, result = frozenset(suggestion.changes), (suggestion.model, suggestion.run)
        if kind in found or result in seen:
            continue
        seen.add(result)
        if suggestion.estimate.fits(device_bytes, host_bytes):
            found[kind] = suggestion
    return list(found.values())


def _single_changes(start: Suggestion, with_adapter: ModelSpec | None, max_ranks: int) -> Iterator[Suggestion]:
    """Yield the run of `start` with each single change."""
    run = start.run
    if not run.checkpoint_every:
        yield start.then(
            {"--activation_checkpointing": "True"}, "recompute activations", RECOMPUTING, checkpoint_every=1
        )
    yield from _smaller_batches(start)
    if run.ranks > 1 and run.offload_optimizer == "none":
        for stage, slower in STAGES.items():
            if stage > (run.stage or 0):
                yield _with_zero(start, f"zero{stage}", f"ZeRO stage {stage}", slower, stage=stage)
    if not run.use_cpu and run.stage != 3 and run.offload_optimizer == "none":
        words = "optimizer states in host memory"
        yield _with_zero(start, "zero2_offload", words, OFFLOADED, stage=2, offload_optimizer="cpu")
    if not run.use_cpu and run.offload_parameters == "none":
        words, places = "optimizer states and parameters in host memory", ("offload_optimizer", "offload_parameters")
        yield _with_zero(start, "zero3_offload", words, ALL_OFFLOADED, stage=3, **dict.fromkeys(places, "cpu"))
    if with_adapter is not None and not start.model.adapter:
        yield start.then({"--use_lora": "True"}, "train LoRA adapters only", ADAPTERS, model=with_adapter)
    if start.model.adapter and start.model.bits is None and start.model.quantizable:
        words = "the base in 4 bits"
        yield start.then({"--load_in_4bit": "True"}, words, FOUR_BITS, model=replace(start.model, bits=4))
    for times in (2, 4, 8):
        ranks, accumulation = run.ranks * times, run.accumulation // times
        if ranks <= max_ranks and run.accumulation % times == 0:
            here = {"--num_gpus": str(ranks)} if run.on_host == run.ranks else {"--hostfile": f"one with {ranks} slots"}
            changes = {**here, "--gradient_accumulation_steps": str(accumulation)}
            words = f"{ranks} ranks instead of {run.ranks}"
            yield start.then(changes, words, DOUBLED, ranks=ranks, accumulation=accumulation)


def _with_zero(start: Suggestion, config: str, words: str, slower: float, *, stage: int, **fields: Any) -> Suggestion:
    bucket = None if stage == 3 else BUCKET
    return start.then({"--deepspeed": config}, words, slower, stage=stage, reduce_bucket=bucket, **fields)


def _smaller_batches(start: Suggestion) -> Iterator[Suggestion]:
    """Yield the same rows per step in smaller micro-batches."""
    run = start.run
    divisors = [rows for rows in range(run.rows - 1, 0, -1) if run.rows % rows == 0]
    for count, rows in enumerate(divisors, start=1):
        parts = run.rows // rows
        accumulation = run.accumulation * parts
        tokens = max(-(-run.tokens // parts), min(run.longest, run.tokens))
        yield start.then(
            {"--per_device_train_batch_size": str(rows), "--gradient_accumulation_steps": str(accumulation)},
            f"{rows} rows per micro-batch accumulated {accumulation} times",
            (HALVED_ZERO3 if run.stage == 3 else HALVED) ** count,
            rows=rows,
            accumulation=accumulation,
            tokens=tokens,
            logits=min(run.logits, tokens),
        )
