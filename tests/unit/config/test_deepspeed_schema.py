"""What the installed DeepSpeed reads of a config, and what both it and the command line decide."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from finetune.config import deepspeed_schema
from finetune.config.deepspeed_config import DeepSpeedFlags, load_config, resolve_deepspeed_config
from finetune.config.deepspeed_optimizers import DEEPSPEED_CLASSES, operators_of, optimizer_options
from finetune.config.deepspeed_resolver import SCHEDULES
from finetune.config.deepspeed_schema import UNSERVED, schema_faults, without_comments
from finetune.utils.errors import ConfigError
from finetune.utils.options import source_folder
from tests.helpers.paths import ROOT

FILES = [*sorted((ROOT / "ds_configs").glob("*.json")), ROOT / "finetune" / "ds_config.json"]
FLAGS = DeepSpeedFlags(
    per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=1.0, learning_rate=2e-5,
    adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-8, weight_decay=1e-4, precision="float32",
)  # fmt: skip
STAGE_2 = {"zero_optimization": {"stage": 2}}


def resolved(
    config: dict, flags: DeepSpeedFlags = FLAGS, ranks: int = 1, *, use_cpu: bool = False, **options: Any
) -> Any:
    return resolve_deepspeed_config(
        Path("mine.json"), config, flags, world_size=ranks, local_world_size=ranks, use_cpu=use_cpu, **options
    )


def refusal(config: dict, flags: DeepSpeedFlags = FLAGS, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        resolved(config, flags, **options)
    return str(raised.value)


@pytest.mark.parametrize("use_cpu", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 16])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_is_served(file, ranks, use_cpu, tmp_path):
    config = json.loads(json.dumps(load_config(file)).replace("/local_nvme", str(tmp_path)))
    assert resolved(config, ranks=ranks, use_cpu=use_cpu).config["train_batch_size"] == 8 * ranks


def config_with(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", UNSERVED)
def test_a_key_that_is_not_served_is_one_of_deepspeeds(key, monkeypatch):
    refused = {"enabled": 5}
    assert [path for path, _ in schema_faults(config_with(key, refused))] == [tuple(key.split("."))]
    allowed, _ = UNSERVED[key]
    served = config_with(key, allowed[0] if allowed else {})
    assert allowed == () or schema_faults(served) == []
    monkeypatch.setattr(deepspeed_schema, "UNSERVED", {})
    assert [text for _, text in schema_faults(served) if "is not a DeepSpeed key" in text] == []
    assert "is not a DeepSpeed key" in schema_faults(config_with(f"{key}_", 1))[0][1]


def test_a_misspelt_key_at_any_depth_is_named_with_the_nearest():
    config = {
        "gradient_cliping": 1.0,
        "zero_optimization": {"stage": 3, "overlap_com": True, "offload_param": {"devise": "cpu"}},
        "activation_checkpointing": {"partition_activation": True},
        "optimizer": {"typ": "AdamW"},
        "aio": {"thread_count": 1},
        "stage": 2,
    }
    faults = dict(schema_faults(config))
    assert {key[-1]: text.rpartition(": ")[2] for key, text in faults.items()} == {
        "gradient_cliping": 'did you mean "gradient_clipping"?',
        "overlap_com": 'did you mean "overlap_comm"?',
        "devise": 'did you mean "device"?',
        "partition_activation": 'did you mean "partition_activations"?',
        "typ": 'did you mean "type"?',
        "thread_count": "leave it out",
        "stage": "it belongs to zero_optimization",
    }
    without_import = dict(schema_faults(config, imports_deepspeed=False))
    assert without_import.items() <= faults.items()
    assert {"gradient_cliping", "overlap_com", "devise", "stage"} <= {key[-1] for key in without_import}


@pytest.mark.parametrize("section", ["comms_logger", "csv_monitor", "zero_optimization.leaf_module", "tensor_parallel"])
def test_a_key_of_another_section_is_said_to_belong_there_in_every_section(section):
    faults = schema_faults(config_with(f"{section}.stage", 1))
    assert [text for _, text in faults] == [
        f'"{section}.stage" is not a DeepSpeed key: it belongs to zero_optimization'
    ]


def test_the_sources_show_the_same_wrong_types_as_the_models():
    offload = {"device": "gpu", "pin_memory": "perhaps", "ratio": 2}
    zero = {"overlap_comm": "x", "reduce_bucket_size": "5e8", "sub_group_size": "auto", "offload_optimizer": offload}
    config = {"zero_optimization": {"stage": 2, **zero}, "bf16": {"enabled": "auto"}, "overlap_comm": True}
    faults = dict(schema_faults(config))
    ratio = ("zero_optimization", "offload_optimizer", "ratio")  # a bound, of which the types say nothing
    assert len(faults) == 6 and ratio in faults
    assert dict(schema_faults(config, imports_deepspeed=False)) == {k: v for k, v in faults.items() if k != ratio}


def test_a_refusal_that_comes_after_all_keys_are_read_names_the_section_that_causes_it():
    [(key, text)] = schema_faults({"bf16": {"enabled": True, "bf16_optimizer_states": True}, "aio": {}})
    assert key == ("bf16",) and "bf16_optimizer_states" in text


def test_comments_are_left_out_at_any_depth():
    config = {"_comment": 1, "//": 2, "#note": 3, "fp16": {"_why": 4, "enabled": False}}
    assert without_comments(config) == {"fp16": {"enabled": False}}


@pytest.mark.parametrize(
    ("kind", "gpu", "cpu", "takes"),
    [
        ("Adam", True, True, {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam"}),
        ("AdamW", True, True, {"lr", "betas", "eps", "weight_decay", "bias_correction"}),
        ("Lamb", True, False, {"lr", "betas", "max_coeff"}),
        ("Lion", True, False, {"lr", "betas", "weight_decay"}),
        ("Adagrad", True, True, {"lr", "eps", "weight_decay"}),
        ("Muon", True, True, {"lr", "momentum", "muon_lr", "adam_lr"}),
        ("SGD", True, True, {"lr", "momentum", "nesterov"}),
        ("OneBitAdam", False, False, set()),
        ("ZeroOneAdam", False, False, set()),
        ("OneBitLamb", False, False, set()),
        ("MuAdam", False, False, set()),
        ("Optimizers", False, False, set()),
    ],
)
def test_an_optimizer_takes_what_its_class_takes(kind, gpu, cpu, takes):
    for use_cpu, can in ((False, gpu), (True, cpu)):
        if can:
            assert takes <= optimizer_options(kind, {}, offloads=False, use_cpu=use_cpu)
        else:
            with pytest.raises(ValueError, match=r"GPU|can build it"):
                optimizer_options(kind, {}, offloads=False, use_cpu=use_cpu)


def test_the_sources_name_the_options_that_the_classes_of_optimizers_have():
    import deepspeed.ops.adagrad
    import deepspeed.ops.adam

    classes = [cls for cls in vars(torch.optim).values() if isinstance(cls, type) and cls is not torch.optim.Optimizer]
    assert len(classes) > 10
    for cls in classes:
        taken = [*inspect.signature(cls).parameters][1:]
        if cls.__name__.lower() not in (*DEEPSPEED_CLASSES, "muon"):
            assert optimizer_options(cls.__name__, {}, offloads=False, use_cpu=True) == {*taken}
    for kind, cls in (
        ("Adam", deepspeed.ops.adam.DeepSpeedCPUAdam),
        ("Adagrad", deepspeed.ops.adagrad.DeepSpeedCPUAdagrad),
    ):
        taken = [*inspect.signature(cls).parameters][1:]
        assert {*taken} <= optimizer_options(kind, {}, offloads=True, use_cpu=True)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"type": "AdamWW"},
            'optimizer.type is "AdamWW": neither DeepSpeed nor torch.optim can build it: did you mean "AdamW"?',
        ),
        ({"type": "adamax"}, 'did you mean "Adamax"?'),
        ({"type": "OneBitAdam"}, "expected one of AdamW, Adam, Lion, "),
        ({"type": 3}, "optimizer.type is 3: expected a name, such as AdamW"),
        (
            {"type": "AdamW", "params": {"beta": [0.9, 0.95]}},
            'optimizer.params.beta" is not a DeepSpeed key: did you mean "betas"?',
        ),
        ({"type": "SGD", "params": {"momemtum": 0.9}}, 'did you mean "momentum"?'),
    ],
)
def test_an_optimizer_section_is_checked_alike_before_and_with_the_import_of_deepspeed(section, said):
    config = {"zero_allow_untested_optimizer": True, **STAGE_2, "optimizer": section}
    message = refusal(config, imports_deepspeed=False)
    assert said in message and message == refusal(config)


def test_what_an_optimizer_section_leaves_out_comes_from_the_flags():
    """DeepSpeed's own defaults differ: a learning rate of 1e-3, no weight decay."""
    config = {**STAGE_2, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    params = resolved(config).config["optimizer"]["params"]
    assert params == {"lr": 2e-5, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 1e-4}


@pytest.mark.parametrize(
    ("section", "given", "agrees"),
    [
        ({"type": "AdamW"}, {"optim": "adamw_torch"}, True),
        ({"type": "Adam"}, {"optim": "adamw_torch_fused"}, True),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, {"optim": "adamw_torch"}, False),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, {}, True),
        ({"type": "AdamW"}, {"optim": "adamw_torch_8bit"}, False),
        ({"type": "Lion"}, {"optim": "lion_8bit"}, False),
        ({"type": "Lion"}, {}, True),
        ({"type": "Lion"}, {"adam_epsilon": 1e-6}, False),
        ({"type": "Lamb"}, {}, False),
    ],
)
def test_an_optimizer_and_the_flags_agree_or_are_both_named(section, given, agrees):
    flags, config = replace(FLAGS, given=given), {**STAGE_2, "optimizer": section}
    if agrees:
        assert resolved(config, flags).config["optimizer"]["type"] == section["type"]
        return
    message = refusal(config, flags)
    assert f'optimizer.type is "{section["type"]}"' in message
    assert all(f"--{name} is {value}" in message for name, value in given.items())


def test_an_optimizer_whose_averaged_weights_deepspeed_does_not_save_is_refused():
    for optim in ("schedule_free_adamw", "schedule_free_sgd"):
        assert f"--optim {optim}: DeepSpeed never saves" in refusal(STAGE_2, replace(FLAGS, given={"optim": optim}))


@pytest.mark.parametrize(("optim", "agrees"), [("adamw_torch", True), ("sgd", False), ("adamw_torch_8bit", False)])
def test_offloading_keeps_the_optimizer_of_the_flag_or_both_are_named(optim, agrees):
    """accelerate puts DeepSpeed's CPU Adam in the place of any other."""
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    flags = replace(FLAGS, given={"optim": optim})
    if agrees:
        assert resolved(config, flags).offloads
        assert resolved({**config, "zero_force_ds_cpu_optimizer": False}, replace(FLAGS, given={"optim": "sgd"}))
    else:
        message = refusal(config, flags)
        assert "offload_optimizer" in message and f"--optim is {optim}" in message


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
@pytest.mark.parametrize("flag", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_a_schedule_says_what_the_flag_says_or_both_are_named(kind, flag):
    config = {"scheduler": {"type": kind, "params": {"warmup_num_steps": "auto"}}}
    flags = replace(FLAGS, lr_scheduler_type=flag, given={"lr_scheduler_type": flag})
    if SCHEDULES.get(kind) == flag:
        found = resolved(config, flags)
        assert "scheduler" not in found.config and f"scheduler {kind} is --lr_scheduler_type {flag}" in found.notes[0]
    else:
        message = refusal(config, flags)
        assert f'scheduler.type is "{kind}"' in message and f"is {flag}" in message


@pytest.mark.parametrize(("kind", "flag"), SCHEDULES.items())
def test_a_schedule_without_the_flag_is_that_of_the_section(kind, flag):
    found = resolved({"scheduler": {"type": kind}}, replace(FLAGS, given={}))
    assert found.lr_scheduler_type == flag and "scheduler" not in found.config
    assert "where DeepSpeed's default is logarithmic" in found.notes[0]


@pytest.mark.parametrize(("kind", "flag"), SCHEDULES.items())
def test_the_schedules_that_count_as_the_same_have_the_same_rates(kind, flag):
    """With a linear warm-up. DeepSpeed's cosine is one step ahead once the warm-up is over."""
    from deepspeed.runtime import lr_schedules

    def rates(build: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        schedule = build(optimizer)
        found = []
        for _ in range(20):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    options: dict[str, Any] = {"warmup_num_steps": 5, "warmup_type": "linear"}
    options |= {"total_num_steps": 20} if kind != "WarmupLR" else {}
    options |= {"cos_min_ratio": 0.0} if kind == "WarmupCosineLR" else {"warmup_max_lr": 0.1}
    ours = rates(lambda optimizer: get_scheduler(flag, optimizer, 5, 20))
    theirs = rates(lambda optimizer: getattr(lr_schedules, kind)(optimizer, **options))
    assert ours[:4] == pytest.approx(theirs[1:5], abs=1e-9)
    rest = theirs[5:] if kind == "WarmupCosineLR" else theirs[6:]
    assert ours[5 : 5 + len(rest)] == pytest.approx(rest, abs=1e-9) and len(rest) >= 14


OFFLOADS = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("config", "operators"),
    [
        ({}, []),
        ({"optimizer": {"type": "AdamW"}}, ["fused_adam"]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ({"optimizer": {"type": "Muon"}}, []),
        ({"optimizer": {"type": "Lion"}} | OFFLOADS, ["cpu_lion"]),
        (OFFLOADS, ["cpu_adam"]),  # accelerate's choice
        (OFFLOADS | {"zero_force_ds_cpu_optimizer": False}, []),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}, "zero_quantized_weights": True}},
         ["quantizer", "async_io"]),
    ],
)  # fmt: skip
def test_the_operators_of_a_config_are_those_of_its_optimizer_and_devices(config, operators):
    assert operators_of(config, use_cpu=False) == operators
    assert operators_of(config, use_cpu=True) == ["deepspeed_shm_comm", *operators]
    sources = source_folder("deepspeed") / "ops/op_builder"
    assert all(list(sources.rglob(f"{name}.py")) for name in operators)
