import pytest

from finetune.config.hardware import DetectedHardware, Gpu, detect_hardware, resolve_hardware
from finetune.utils.errors import ConfigError

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0))
T4 = Gpu("Tesla T4", (7, 5))
V100 = Gpu("Tesla V100-SXM2-32GB", (7, 0))

CPU = DetectedHardware()
CPU_WITH_BF16 = DetectedHardware(cpu_bf16=True)
FLASH, FLASH_ATTN = "flash_attention_2", frozenset({"flash-attn"})
BF16_DEFAULT = "computing in bf16, the default of this GPU; --bf16 False"

# id, what was found, what was asked, (precision, tf32, attention), a fragment of each line that the user reads
SITUATIONS = [
    ("H100", DetectedHardware((H100,), libraries=FLASH_ATTN), {"bf16": True, "tf32": True}, ("bf16", True, FLASH), []),
    ("H100-fp16", DetectedHardware((H100,), libraries=FLASH_ATTN), {"fp16": True}, ("fp16", None, FLASH), []),
    ("H100-no-flash", DetectedHardware((H100,)), {"bf16": True, "tf32": True}, ("bf16", True, "sdpa"), []),
    (
        "H100-flash-asked-not-installed",
        DetectedHardware((H100,)),
        {"bf16": True, "attn_implementation": FLASH},
        ("bf16", None, "sdpa"),
        ["falls back to sdpa: flash-attn is not installed"],
    ),
    ("H100-no-flags", DetectedHardware((H100,), libraries=FLASH_ATTN), {}, ("bf16", None, FLASH), [BF16_DEFAULT]),
    ("H100-float32", DetectedHardware((H100,), libraries=FLASH_ATTN), {"bf16": False}, ("float32", None, "sdpa"), []),
    ("H100-and-V100", DetectedHardware((H100, V100)), {}, ("float32", None, "sdpa"), ["Tesla V100-SXM2-32GB (compute"]),
    (
        "H100-flash-asked-in-float32",
        DetectedHardware((H100,), libraries=FLASH_ATTN),
        {"bf16": False, "attn_implementation": FLASH},
        ("float32", None, "sdpa"),
        ["falls back to sdpa: it computes in bf16 or fp16 only; add --bf16 True"],
    ),
    (
        "H100-eager-asked",
        DetectedHardware((H100,), libraries=FLASH_ATTN),
        {"bf16": True, "attn_implementation": "eager"},
        ("bf16", None, "eager"),
        [],
    ),
    ("H100-tf32-refused", DetectedHardware((H100,)), {"bf16": True, "tf32": False}, ("bf16", False, "sdpa"), []),
    ("A100", DetectedHardware((A100,), libraries=FLASH_ATTN), {"bf16": True, "tf32": True}, ("bf16", True, FLASH), []),
    ("A100-no-flash", DetectedHardware((A100,)), {"bf16": True, "tf32": True}, ("bf16", True, "sdpa"), []),
    ("V100", DetectedHardware((V100,), libraries=FLASH_ATTN), {"fp16": True}, ("fp16", None, "sdpa"), []),
    ("V100-no-flags", DetectedHardware((V100,)), {}, ("float32", None, "sdpa"), ["--fp16 True is several times"]),
    (
        "V100-tf32",
        DetectedHardware((V100,)),
        {"fp16": True, "tf32": True},
        ("fp16", None, "sdpa"),
        ["--tf32 is off: Tesla V100-SXM2-32GB (compute capability 7.0) is older than Ampere"],
    ),
    (
        "V100-flash-asked",
        DetectedHardware((V100,), libraries=FLASH_ATTN),
        {"fp16": True, "attn_implementation": FLASH},
        ("fp16", None, "sdpa"),
        ["falls back to sdpa: Tesla V100-SXM2-32GB (compute capability 7.0) is older than Ampere"],
    ),
    (
        "H100-and-A100",
        DetectedHardware((H100, A100), libraries=FLASH_ATTN),
        {"bf16": True, "tf32": True},
        ("bf16", True, FLASH),
        [],
    ),
    (
        "H100-V100-T4-the-least-decides",
        DetectedHardware((H100, V100, T4), libraries=FLASH_ATTN),
        {"fp16": True, "tf32": True, "attn_implementation": FLASH},
        ("fp16", None, "sdpa"),
        ["--tf32 is off: Tesla V100", "falls back to sdpa: Tesla V100"],
    ),
    ("CPU-no-flags", CPU, {}, ("float32", None, "sdpa"), []),
    ("CPU-bf16-units", CPU_WITH_BF16, {"bf16": True}, ("float32", None, "sdpa"), ["--bf16 is off: it is not needed"]),
    ("CPU-bf16-emulated", CPU, {"bf16": True}, ("float32", None, "sdpa"), ["--bf16 is off: it would be emulated"]),
    ("CPU-fp16", CPU_WITH_BF16, {"fp16": True}, ("float32", None, "sdpa"), ["--fp16 is off: there is no GPU here"]),
    ("CPU-tf32-refused", CPU, {"tf32": False}, ("float32", None, "sdpa"), []),
    (
        "CPU-flash-asked",
        CPU_WITH_BF16,
        {"bf16": True, "attn_implementation": FLASH},
        ("float32", None, "sdpa"),
        ["--bf16 is off: it is not needed", "falls back to sdpa: it needs a GPU"],
    ),
    (
        "CPU-published-command",
        CPU,
        {"bf16": True, "tf32": True},
        ("float32", None, "sdpa"),
        ["--bf16 is off", "--tf32 is off: it is a mode of NVIDIA GPUs"],
    ),
]


@pytest.mark.parametrize(
    ("found", "asked", "decided", "lines"), [row[1:] for row in SITUATIONS], ids=[row[0] for row in SITUATIONS]
)
def test_each_situation_is_decided_and_every_difference_is_said(found, asked, decided, lines):
    hardware = resolve_hardware(found, **asked)

    assert (hardware.precision, hardware.tf32, hardware.attention) == decided
    assert len(hardware.notes) == len(lines)
    for note, line in zip(hardware.notes, lines, strict=True):
        assert line in note
        assert "\n" not in note


@pytest.mark.parametrize(
    ("gpu", "installed", "requested", "taken"),
    [
        (H100, {"flash-attn", "flash-attn-3"}, None, "flash_attention_3"),
        (A100, {"flash-attn", "flash-attn-3"}, None, FLASH),
        (H100, {"flash-attn-4"}, None, "flash_attention_4"),
        (A100, {"flash-attn-4", "kernels"}, None, "sdpa"),
        (Gpu("NVIDIA B200", (10, 0)), {"flash-attn", "flash-attn-3"}, None, FLASH),
        (Gpu("NVIDIA RTX PRO 6000", (12, 0)), {"flash-attn-4", "flash-attn"}, None, "flash_attention_4"),
        (H100, {"flash-attn"}, "flash_attention_3", "sdpa"),
        (H100, {"kernels"}, "flash_attention_3", "flash_attention_3"),
        (H100, set(), "kernels-community/flash-attn3", "kernels-community/flash-attn3"),
    ],
)
def test_the_fastest_flash_attention_that_is_installed_is_taken(gpu, installed, requested, taken):
    found = DetectedHardware((gpu,), libraries=frozenset(installed))
    assert resolve_hardware(found, bf16=True, attn_implementation=requested).attention == taken


@pytest.mark.parametrize(
    ("found", "backend", "use_cpu"),
    [(DetectedHardware((H100,)), "nccl", False), (CPU, "gloo", True)],
    ids=["GPU", "CPU"],
)
def test_the_backend_follows_the_device(found, backend, use_cpu):
    hardware = resolve_hardware(found)

    assert (hardware.backend, hardware.use_cpu) == (backend, use_cpu)


@pytest.mark.parametrize("gpus", [(V100,), (H100, V100), (V100, H100, A100)], ids=["alone", "second", "first"])
def test_bf16_without_its_units_is_an_error_that_names_the_gpu_and_the_flag_to_use(gpus):
    with pytest.raises(ConfigError) as raised:
        resolve_hardware(DetectedHardware(gpus, libraries=FLASH_ATTN), bf16=True)

    assert "--bf16 True: Tesla V100-SXM2-32GB (compute capability 7.0)" in str(raised.value)
    assert "--fp16 True" in str(raised.value)


def test_the_probe_leaves_gpus_out_where_the_cpu_was_asked_for():
    found = detect_hardware(use_cpu=True)

    assert found.gpus == ()
    assert resolve_hardware(found).use_cpu
