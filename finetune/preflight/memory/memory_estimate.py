"""One `MemoryEstimate` of a shape and a job."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.preflight.memory import disk_space, host_memory
from finetune.preflight.memory.cpu_memory import process_phases
from finetune.preflight.memory.device_memory import FRAMEWORK, GPU_CONTEXT, GPU_FRAGMENTATION, NAMES, Parts, phases
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes.

    Attributes:
        device: by name, of one rank at its worst moment, `phase`. On a CPU: by what its process grows.
        by_phase: the same total in every phase.
        host_loading, host_training, host_saving: of the fullest host, all its ranks together; on a CPU the whole of
            their processes, else beside the GPUs.
        checkpoint: by name, one on the disk, of all ranks.
        result: the trained model or adapter.
        kept: what the output folder takes at most with `save_total_limit`; None: it grows with each checkpoint.
    """

    device: Parts
    phase: str
    by_phase: dict[str, float]
    host_loading: float
    host_training: float
    host_saving: float
    checkpoint: Parts
    result: float
    kept: float | None

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

    def fits(self, device_bytes: float, host_bytes: float | None = None) -> bool:
        """Whether device and, where it is given, host hold it."""
        return self.device_total <= device_bytes and (host_bytes is None or self.host_total <= host_bytes)


def estimate_memory(shape: ModelSpec, job: RunSpec) -> MemoryEstimate:
    """What a run of `job` on a model of `shape` takes; the sources stand with the parts, in `device` and `process`.

    Raises:
        ValueError: a job that DeepSpeed would refuse: offloaded parameters without stage 3, a stage that is none.
    """
    if job.stage not in (None, 0, 1, 2, 3):
        raise ValueError(f"stage {job.stage}: expected None, 0, 1, 2 or 3")
    if job.offload_parameters != "none" and job.stage != 3:
        raise ValueError(f"offload_parameters needs stage 3, not {job.stage}")
    found = process_phases(shape, job) if job.use_cpu else _with_framework(phases(shape, job))
    totals = {name: sum(parts.values()) for name, parts in found.items()}
    worst = max(totals, key=totals.__getitem__)
    names = (*NAMES, *(name for name in found[worst] if name not in NAMES))
    parts = {name: found[worst][name] for name in names if found[worst].get(name)}
    return MemoryEstimate(
        device=parts,
        phase=worst,
        by_phase=totals,
        **_hosts(shape, job, totals),
        checkpoint=disk_space.checkpoint(shape, job),
        result=disk_space.result(shape, job),
        kept=disk_space.kept(shape, job),
    )


def _with_framework(found: dict[str, Parts]) -> dict[str, Parts]:
    return {
        name: {**parts, FRAMEWORK: GPU_CONTEXT + GPU_FRAGMENTATION * sum(parts.values())}
        for name, parts in found.items()
    }


def _hosts(shape: ModelSpec, job: RunSpec, totals: dict[str, float]) -> dict[str, float]:
    if not job.use_cpu:
        loading, training, saving = (
            one(shape, job) for one in (host_memory.loading, host_memory.training, host_memory.saving)
        )
        return {"host_loading": loading, "host_training": training, "host_saving": saving}
    ranks = job.on_host
    copies = disk_space.result(shape, job) * (1 if job.stage in (3, None) else ranks)
    held = max(total for name, total in totals.items() if name not in ("loading", "building"))
    return {
        "host_loading": ranks * (host_memory.PROCESS_ON_CPU + max(totals["loading"], totals["building"])),
        "host_training": ranks * (host_memory.PROCESS_ON_CPU + held),
        "host_saving": ranks * (host_memory.PROCESS_ON_CPU + held) + copies,
    }
