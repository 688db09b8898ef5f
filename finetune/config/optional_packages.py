"""Packages that a run needs only for some flags: whether they are installed, found without importing them."""

import re
from collections.abc import Sequence
from importlib.util import find_spec

from finetune.config.adapter_arguments import AdapterArguments
from finetune.config.arguments import Arguments
from finetune.config.hardware import HardwareConfig
from finetune.utils.errors import ConfigError, raise_faults

# The trackers of transformers; the package and the modules of one where these have another name.
TRACKERS = (
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune",
    "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
TRACKER_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
TRACKER_MODULES = {"azure_ml": ["azureml"], "flyte": ["flytekit"], "tensorboard": ["tensorboard", "tensorboardX"]}
# What optimizers of --optim need, the first that fits: their names, the module, the package.
OPTIMIZER_PACKAGES = (
    (r"adamw_torch_[48]bit", "torchao", "torchao"),
    ("galore_.*", "galore_torch", "galore-torch"),
    ("apollo_.*", "apollo_torch", "apollo-torch"),
    ("(ada)?lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free_.*", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("paged_.*|lion_.*|ademamix.*|rmsprop_bnb.*|adamw_(bnb_)?8bit", "bitsandbytes", "'bitsandbytes>=0.50,<0.51'"),
)
BITSANDBYTES = "bitsandbytes>=0.50,<0.51"


def check_trackers(names: Sequence[str]) -> None:
    """Check that each tracker of `--report_to` is one, and installed, without importing it.

    Raises:
        ConfigError: the line that installs it, or all names.
    """
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in TRACKERS:
            raise ConfigError(f"--report_to {name}: expected none, all or some of {', '.join(TRACKERS)}")
        if not any(find_spec(module) for module in TRACKER_MODULES.get(name, [name])):
            package = TRACKER_PACKAGES.get(name, name)
            raise ConfigError(f"--report_to {name}: it is not installed: pip install {package}")


def check_liger(arguments: Arguments, hardware: HardwareConfig) -> None:
    """Check that Liger's kernels are installed and can run, if the flags name them."""
    if not arguments.given("use_liger_kernel"):
        return
    if hardware.use_cpu:
        raise ConfigError("--use_liger_kernel True: its kernels need a GPU, and there is none here: omit the flag")
    if find_spec("liger_kernel") is None:
        raise ConfigError("--use_liger_kernel True: it is not installed: pip install liger-kernel")


def check_optimizer(optim: str) -> None:
    """Check that the package of an optimizer of transformers is installed.

    Raises:
        ConfigError: the line that installs it.
    """
    for names, module, package in OPTIMIZER_PACKAGES:
        if re.fullmatch(names, optim):
            if find_spec(module) is None:
                raise ConfigError(f"--optim {optim}: {module} is not installed: pip install {package}")
            return


def check_quantization(bits: int | None, label: str, adapter: AdapterArguments, zero_stage: int | None) -> None:
    """Check that the weights of the base can be quantized and trained with, if the flags say so.

    Args:
        bits: 4, 8 or None.
        label: What quantizes them, for messages.

    Raises:
        ConfigError: all reasons why not.
    """
    if bits is None:
        return
    faults = {
        "quantized weights cannot be trained: add --use_lora True": adapter.kind() != "lora",
        "LoRA initialised from the weights (PiSSA, OLoRA) needs them unquantized: leave --init_lora_weights "
        "out": adapter.starts_from_weights(),
        "peft's DoRA loses the scales of 8-bit weights after one pass: give --load_in_4bit True, or leave --use_dora "
        "out": bits == 8 and bool(adapter.peft_options().get("use_dora")),
        "bitsandbytes holds 8-bit weights beside the parameters, so ZeRO-3 would partition none of them: give "
        "--load_in_4bit True, or --deepspeed zero2": bits == 8 and zero_stage == 3,
    }
    raise_faults([f"{label}: {reason}" for reason, applies in faults.items() if applies])
    check_installed(label)


def check_installed(label: str) -> None:
    """Check that bitsandbytes is installed, which packs weights and multiplies packed ones."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{label}: bitsandbytes is not installed: pip install '{BITSANDBYTES}'")
