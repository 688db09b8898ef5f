"""Flags whose packages are missing, or that exclude each other, end before anything is loaded."""

import importlib.util
import re

import pytest

from finetune.config import optional_packages
from finetune.config.adapter_arguments import AdapterArguments
from finetune.config.hardware import DetectedHardware, Gpu, resolve_hardware
from finetune.config.optional_packages import OPTIMIZER_PACKAGES as PACKAGES
from finetune.config.optional_packages import TRACKERS, check_liger, check_optimizer, check_quantization, check_trackers
from finetune.utils.errors import ConfigError
from tests.helpers.flag_parsing import parsed

LORA = {"use_lora": True}


@pytest.fixture
def lacking(monkeypatch):
    def remove(*names: str) -> None:
        there = importlib.util.find_spec
        monkeypatch.setattr(optional_packages, "find_spec", lambda name: None if name in names else there(name))

    return remove


def test_the_names_are_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_a_tracker_that_is_missing_is_told_with_the_line_that_installs_it(lacking):
    lacking("comet_ml")
    check_trackers(["none"])
    check_trackers(["tensorboard", "all"])
    with pytest.raises(ConfigError, match="--report_to comet_ml: it is not installed: pip install comet-ml"):
        check_trackers(["tensorboard", "comet_ml"])
    with pytest.raises(ConfigError, match="--report_to wandbb: expected none, all or some of azure_ml, clearml"):
        check_trackers(["wandbb"])


@pytest.mark.parametrize(
    ("bits", "adapter", "stage", "reason"),
    [
        (4, {}, 2, "--load_in_4bit True: quantized weights cannot be trained: add --use_lora"),
        (8, {"adapter": "prefix"}, None, "add --use_lora True"),
        (4, {**LORA, "init_lora_weights": "pissa"}, None, "leave --init_lora_weights out"),
        (8, LORA, 3, "give --load_in_4bit True, or --deepspeed zero2"),
        (8, {**LORA, "use_dora": True}, 2, "or leave --use_dora out"),
    ],
)
def test_what_quantized_weights_cannot_do(bits, adapter, stage, reason):
    check_quantization(None, "", AdapterArguments(**adapter), stage)
    with pytest.raises(ConfigError) as error:
        check_quantization(bits, f"--load_in_{bits}bit True", AdapterArguments(**adapter), stage)
    assert reason in str(error.value)


def test_a_missing_package_of_an_optimizer_is_told_with_the_line_that_installs_it(lacking):
    check_optimizer("adamw_8bit")
    lacking("bitsandbytes", "schedulefree", "torchao")
    check_optimizer("adafactor")
    for optim, package in {
        "paged_adamw_8bit": "'bitsandbytes>=0.50,<0.51'",
        "lion_32bit": "'bitsandbytes>=0.50,<0.51'",
        "schedule_free_adamw": "schedulefree",
        "adamw_torch_4bit": "torchao",
    }.items():
        with pytest.raises(ConfigError, match=f"--optim {optim}: .* is not installed: pip install {package}"):
            check_optimizer(optim)


def test_every_optimizer_of_transformers_that_is_not_built_here_has_a_package():
    from transformers.training_args import OptimizerNames

    named = {name.value for name in OptimizerNames if any(re.fullmatch(names, name.value) for names, *_ in PACKAGES)}
    assert {name.value for name in OptimizerNames} - named == {
        *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
        *("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"),  # of other hardware, and archived
    }


def test_bitsandbytes_is_named_where_it_is_missing(lacking):
    flags = 4, "--load_in_4bit True", AdapterArguments(**LORA), 3
    check_quantization(*flags)
    lacking("bitsandbytes")
    with pytest.raises(ConfigError, match="pip install 'bitsandbytes"):
        check_quantization(*flags)


def test_kernels_of_liger_need_a_gpu_and_their_package(lacking):
    cpu = resolve_hardware(DetectedHardware())
    gpu = resolve_hardware(DetectedHardware((Gpu("NVIDIA H100 80GB HBM3", (9, 0)),)))
    check_liger(parsed(), cpu)
    with pytest.raises(ConfigError, match="--use_liger_kernel True: its kernels need a GPU, and there is none here"):
        check_liger(parsed("--use_liger_kernel", "True"), cpu)
    lacking("liger_kernel")
    with pytest.raises(ConfigError, match="--use_liger_kernel True: it is not installed: pip install liger-kernel"):
        check_liger(parsed("--use_liger_kernel", "True"), gpu)
