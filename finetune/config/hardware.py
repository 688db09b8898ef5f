"""Hardware of this machine, and the precision, attention and communication backend that follow from it.

`detect_hardware` asks torch; everything else is a pure function of what it returns, so that a laptop can test the
decisions for an H100. Each decision comes with notes for the user; none where the request is met.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.distributed.host_probe import versions
from finetune.utils.errors import ConfigError

Precision = Literal["bf16", "fp16", "float32"]

AMPERE = (8, 0)
# Dense peak rates in TFLOP/s by words of the device's name: half precision, TF32, float32. The makers' data sheets.
PEAK_TFLOPS = {
    "GB300": (2500, 1250, 80), "GB200": (2500, 1250, 80), "B300": (2250, 1125, 75), "B200": (2250, 1125, 75),
    "GH200": (989, 494, 67), "H200 NVL": (835, 417, 60), "H200": (989, 494, 67), "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417, 60), "H100": (989, 494, 67), "H800 PCIe": (756, 378, 51), "H800": (989, 494, 67),
    "H20": (148, 74, 44), "A100": (312, 156, 19.5), "A800": (312, 156, 19.5), "A30": (165, 82, 10.3),
    "A40": (150, 74.8, 37.4), "L40S": (362, 183, 91.6), "L40": (181, 90.5, 90.5), "L20": (119.5, 59.8, 59.8),
    "L4": (121, 60, 30.3), "A10G": (70, 35, 35), "A10": (125, 62.5, 31.2), "A6000": (155, 77.4, 38.7),
    "V100": (125, 15.7, 15.7), "T4": (65, 8.1, 8.1), "RTX PRO 6000": (504, 252, 126),
    "RTX 5090": (209.5, 104.8, 104.8), "RTX 4090": (165, 82.6, 82.6), "RTX 3090": (71, 35.6, 35.6),
    "MI355X": (2516, 157, 157), "MI325X": (1307, 654, 163), "MI300X": (1307, 654, 163),
}  # fmt: skip
FLASH_PACKAGES = {"flash-attn": 2, "flash-attn-3": 3, "flash-attn-4": 4}
# The fastest version of flash attention first, by the major compute capability of Ampere, Hopper and Blackwell.
FLASH_ORDER = {8: (2, 3), 9: (3, 2, 4), 10: (4, 2)}


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name and CUDA compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {'.'.join(map(str, self.capability))})"


@dataclass(frozen=True)
class DetectedHardware:
    """Visible GPUs (none on a CPU machine), bf16 units of the CPU, installed libraries (`host_probe.LIBRARIES`)."""

    gpus: tuple[Gpu, ...] = ()
    cpu_bf16: bool = False
    libraries: frozenset[str] = frozenset()

    @property
    def weakest(self) -> Gpu | None:
        """The GPU with the lowest compute capability: ranks on unequal GPUs must all do what it can do."""
        return min(self.gpus, key=lambda gpu: gpu.capability, default=None)


@dataclass(frozen=True)
class HardwareConfig:
    """Resolved precision, attention and backend, with notes on what differs from the request."""

    precision: Precision
    tf32: bool | None
    attention: str
    backend: Literal["nccl", "gloo"]
    use_cpu: bool
    notes: tuple[str, ...] = ()


def detect_hardware(use_cpu: bool = False) -> DetectedHardware:
    """Detect the hardware with torch; `use_cpu` ignores GPUs."""
    import torch

    gpus: tuple[Gpu, ...] = ()
    if not use_cpu and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = tuple(Gpu(device.name, (device.major, device.minor)) for device in devices)
    return DetectedHardware(
        gpus=gpus,
        cpu_bf16=torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        libraries=frozenset(versions()),
    )


def hardware_of(hosts: Collection[Mapping[str, Any]], *, use_cpu: bool) -> DetectedHardware:
    """Return the hardware of hosts as nvidia-smi reports it there (`host_probe.collect_host_facts`), without torch."""
    gpus = []
    for facts in hosts:
        # Where nvidia-smi does not report the capability, that of data centre GPUs since 2020 is assumed.
        for gpu in facts["gpu_facts"] or [{"name": "GPU", "capability": "[N/A]"}] * facts["gpus"]:
            known = re.fullmatch(r"(\d+)\.(\d+)", gpu["capability"])
            gpus.append(Gpu(gpu["name"], (int(known[1]), int(known[2])) if known else AMPERE))
    libraries = frozenset.intersection(*(frozenset(facts["versions"]) for facts in hosts))
    return DetectedHardware(gpus=() if use_cpu else tuple(gpus), libraries=libraries)


def resolve_hardware(
    detected: DetectedHardware,
    *,
    bf16: bool | None = None,
    fp16: bool = False,
    tf32: bool | None = None,
    attn_implementation: str | None = None,
) -> HardwareConfig:
    """Resolve all that depends on the hardware."""
    precision, precision_notes = decide_precision(detected, bf16=bf16, fp16=fp16)
    use_tf32, tf32_notes = decide_tf32(detected, tf32)
    attention, attention_notes = decide_attention(detected, attn_implementation, precision)
    return HardwareConfig(
        precision=precision,
        tf32=use_tf32,
        attention=attention,
        backend="nccl" if detected.gpus else "gloo",
        use_cpu=not detected.gpus,
        notes=(*precision_notes, *tf32_notes, *attention_notes),
    )


def decide_precision(detected: DetectedHardware, *, bf16: bool | None, fp16: bool) -> tuple[Precision, list[str]]:
    """Return the compute precision: on a GPU as requested or a `ConfigError`; a CPU may compute in a higher one.

    Args:
        bf16: None where neither yes nor no is requested: then a GPU that has bf16 computes in it.
    """
    weakest = detected.weakest
    if weakest is None:
        if bf16:
            # Ranks may sit on CPUs of both kinds, and all must compute alike; bf16 also hides what a rehearsal on a
            # CPU is for: in it the ZeRO stages drift apart within ten steps, in float32 they agree to 1e-5.
            units = (
                "is not needed on a CPU" if detected.cpu_bf16 else "would be emulated by this CPU, many times slower"
            )
            return "float32", [f"--bf16 is off: it {units}; computing in float32"]
        return "float32", ["--fp16 is off: there is no GPU here; computing in float32"] if fp16 else []
    if bf16 and weakest.capability < AMPERE:
        raise ConfigError(f"--bf16 True: {weakest} has no bf16, that needs 8.0; use --fp16 True on this GPU instead")
    if fp16 or bf16 is not None:
        return ("fp16" if fp16 else "bf16" if bf16 else "float32"), []
    if weakest.capability < AMPERE:
        return "float32", [f"computing in float32: {weakest} has no bf16; --fp16 True is several times faster"]
    return "bf16", ["computing in bf16, the default of this GPU; --bf16 False computes in float32"]


def decide_tf32(detected: DetectedHardware, tf32: bool | None) -> tuple[bool | None, list[str]]:
    """Return whether to use TF32, only where every GPU has it; None keeps torch's setting."""
    if not tf32:
        return (tf32 if detected.gpus else None), []
    weakest = detected.weakest
    if weakest is None:
        return None, ["--tf32 is off: it is a mode of NVIDIA GPUs, and there is none here"]
    if weakest.capability < AMPERE:
        return None, [f"--tf32 is off: {weakest} is older than Ampere"]
    return True, []


def decide_attention(detected: DetectedHardware, requested: str | None, precision: Precision) -> tuple[str, list[str]]:
    """Return the `attn_implementation`: the fastest flash attention that is installed and runs, else torch's SDPA."""
    reason = _flash_unsupported_reason(detected, precision)
    if requested is None and detected.weakest is not None and reason is None:
        installed = {FLASH_PACKAGES.get(name) for name in detected.libraries}
        order = FLASH_ORDER.get(detected.weakest.capability[0], FLASH_ORDER[10])
        return next((f"flash_attention_{version}" for version in order if version in installed), "sdpa"), []
    for package, version in FLASH_PACKAGES.items():
        if requested == f"flash_attention_{version}":
            if reason is None and not detected.libraries & {package, "kernels"}:  # transformers takes them from the hub
                reason = f"{package} is not installed (pip install {package} --no-build-isolation)"
            if reason:
                return "sdpa", [f"--attn_implementation {requested} falls back to sdpa: {reason}"]
    return requested or "sdpa", []


def peak_flops(name: str, precision: Precision, tf32: bool | None) -> float | None:
    """Return the peak floating point operations per second of a GPU by its name; None if unknown."""
    words = next((words for words in PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), None)
    half, tf32_rate, full = PEAK_TFLOPS[words] if words else (None, None, None)
    rate = half if precision != "float32" else tf32_rate if tf32 else full
    return None if rate is None else rate * 1e12


def _flash_unsupported_reason(detected: DetectedHardware, precision: Precision) -> str | None:
    if detected.weakest is None:
        return "it needs a GPU, and there is none here"
    if detected.weakest.capability < AMPERE:
        return f"{detected.weakest} is older than Ampere"
    if precision == "float32":
        return "it computes in bf16 or fp16 only; add --bf16 True"
    return None
