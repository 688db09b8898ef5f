"""The memory and disk estimate of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.preflight.memory import host_and_disk
from finetune.preflight.memory.device_memory import NAMES, Parts, cpu_phases, gpu_phases
from finetune.preflight.memory.host_and_disk import cpu_hosts, gpu_hosts
from finetune.preflight.memory.model_spec import ModelSpec, RunSpec


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
