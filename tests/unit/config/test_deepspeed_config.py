import copy
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.utils.errors import ConfigError
from tests.helpers.deepspeed_configs import COMMAND, FLOAT32, nested, refusal, resolved, shipped, typed
from tests.helpers.paths import ROOT

SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def autos(value: Any, prefix: str = "") -> set[str]:
    if isinstance(value, dict):
        return set().union(*(autos(one, f"{prefix}.{key}") for key, one in value.items()))
    return {prefix[1:]} if value == "auto" else set()


# ---- filling


@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_auto_of_a_shipped_config_is_filled(name, precision, tmp_path):
    config = shipped(name, tmp_path)

    found = resolved(config, replace(COMMAND, precision=precision)).config

    assert len(autos(config)) >= 6
    assert autos(found) <= {
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
    }
    assert (found["bf16"]["enabled"], found["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert found["train_micro_batch_size_per_gpu"] == 16
    assert found["gradient_accumulation_steps"] == 2
    assert found["train_batch_size"] == 16 * 2 * 4
    assert found["gradient_clipping"] == 1.0
    if "optimizer" in found:
        own = {"momentum": 0.95} if "muon" in name else {}
        assert found["optimizer"]["params"] == own | {
            "lr": 2e-5,
            "betas": [0.9, 0.98],
            "eps": 1e-8,
            "weight_decay": 1e-4,
        }


@pytest.mark.parametrize(
    ("name", "stage", "offloads"),
    [
        ("zero1", 1, False), ("zero2", 2, False), ("zero2_offload", 2, True), ("zero3", 3, False),
        ("zero3_offload", 3, True), ("zero3_nvme", 3, True), ("zeropp", 3, False),
    ],
)  # fmt: skip
def test_a_shipped_config_is_what_its_name_says(name, stage, offloads, tmp_path):
    found = resolved(shipped(name, tmp_path))

    assert (found.stage, found.offloads, found.notes) == (stage, offloads, ())


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_itself_accepts_every_shipped_config(name, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    found = resolved(shipped(name, tmp_path), ranks=1)

    checked = DeepSpeedConfig(found.config)

    assert checked.zero_optimization_stage == found.stage
    assert (checked.train_batch_size, checked.train_micro_batch_size_per_gpu) == (32, 16)
    assert checked.gradient_clipping == 1.0
    assert checked.bfloat16_config.enabled and not checked.float16_config.enabled


def test_what_a_config_leaves_out_comes_from_the_command_line():
    """DeepSpeed refuses a config without a batch size, though only once the model is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig

    command = replace(COMMAND, max_grad_norm=0.25)

    found = resolved({"zero_optimization": {"stage": 2}}, command, ranks=1).config

    checked = DeepSpeedConfig(found)
    assert (checked.train_batch_size, checked.gradient_accumulation_steps, checked.gradient_clipping) == (32, 2, 0.25)


def test_no_micro_batch_waits_for_the_device_because_of_a_timer_unless_the_config_has_one():
    from deepspeed.utils.config import get_timers_config

    zero = {"zero_optimization": {"stage": 2}}
    wanted = {"throughput": {"enabled": True}}

    default, found, asked = (get_timers_config(config) for config in (
        zero, resolved(zero).config, resolved({**zero, "timers": wanted}).config,
    ))  # fmt: skip

    assert default.enabled and default.synchronized, "DeepSpeed's default no longer waits: leave the key out"
    assert not found.enabled
    assert asked.enabled


@pytest.mark.parametrize("name", SHIPPED)
def test_the_given_config_is_never_changed(name, tmp_path):
    config = shipped(name, tmp_path)
    before = copy.deepcopy(config)

    found = resolved(config, use_cpu=True, command=FLOAT32)
    refusal({**config, "train_batch_size": 7, "gradient_clipping": 9.0})

    assert config == before
    assert found.config != before


def test_a_number_written_as_text_becomes_that_number():
    config = {"train_micro_batch_size_per_gpu": "16", "gradient_clipping": "1", "train_batch_size": 128.0}

    found = resolved(config).config

    values = [found[key] for key in config]
    assert values == [16, 1.0, 128]
    assert [type(value) for value in values] == [int, float, int]


# ---- comparing

MISMATCHES = [
    ("train_micro_batch_size_per_gpu", 8, "--per_device_train_batch_size is 16"),
    ("train_micro_batch_size_per_gpu", "8", "--per_device_train_batch_size is 16"),
    ("gradient_accumulation_steps", 4, "--gradient_accumulation_steps is 2"),
    ("train_batch_size", 64, "16 per device x 2 accumulated x 4 ranks is 128"),
    ("gradient_clipping", 0.5, "--max_grad_norm is 1.0"),
    ("optimizer.params.lr", 0.001, "--learning_rate is 2e-05"),
    ("optimizer.params.betas", [0.9, 0.999], "--adam_beta1, --adam_beta2 is [0.9, 0.98]"),
    ("optimizer.params.eps", 1e-06, "--adam_epsilon is 1e-08"),
    ("optimizer.params.weight_decay", 0.1, "--weight_decay is 0.0001"),
    ("scheduler.params.warmup_max_lr", 0.001, "--learning_rate is 2e-05"),
    ("scheduler.params.warmup_num_steps", 100, "--warmup_steps is 0"),
    ("scheduler.params.total_num_steps", 100, "the number of steps follows from data"),
    ("scheduler.params.warmup_type", "log", "--lr_scheduler_type linear has a linear warm-up"),
    ("scheduler.params.warmup_min_lr", 1e-6, "--lr_scheduler_type linear starts at 0"),
    ("bf16.enabled", False, "this run computes in bf16"),
    ("fp16.enabled", True, "this run computes in bf16"),
]


@pytest.mark.parametrize(("key", "value", "said"), MISMATCHES)
def test_a_mismatch_is_reported_with_both_values(key, value, said):
    message = refusal(typed(nested(key, value)))

    assert message.startswith(f"mine.json: {key} is {json.dumps(value)}, but {said}: ")
    assert "\n" not in message


def test_all_mismatches_are_reported_at_once():
    config: dict = {}
    given = [(key, value, said) for key, value, said in MISMATCHES if value != "8"]
    for key, value, _ in given:
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value

    lines = refusal(typed(config)).splitlines()

    assert lines[0].startswith(f"{len(given)} faults")
    for key, value, said in given:
        assert any(f"{key} is {json.dumps(value)}, but {said}" in line for line in lines[1:])
    assert len(lines) == len(given) + 1


@pytest.mark.parametrize("stage", [4, -1, 1.5, "3", True, False, None, [3], {}])
def test_a_bad_stage_is_shown_as_it_stands(stage):
    message = refusal({"zero_optimization": {"stage": stage}})

    assert message == f"mine.json: zero_optimization.stage is {json.dumps(stage)}: expected 0, 1, 2 or 3"


@pytest.mark.parametrize("value", [3, [], "auto", True, None])
@pytest.mark.parametrize("key", ["zero_optimization", "zero_optimization.offload_param", "fp16", "scheduler.params"])
def test_a_section_is_an_object(value, key):
    outer, _, inner = key.partition(".")
    if value is not None or key == "zero_optimization":
        config = {outer: {inner: value} if inner else value}
        assert f"mine.json: {key} is {json.dumps(value)}: expected an object" == refusal(config)


@pytest.mark.parametrize("key", ["zero_optimisation", "zero_optimizations", "zero_optimiztion", "zero-optimization"])
def test_a_misspelt_zero_optimization_is_not_taken_for_stage_0(key):
    message = refusal({key: {"stage": 3}})

    assert f'"{key}" is not a DeepSpeed key: did you mean "zero_optimization"?' in message


def test_an_auto_that_nothing_decides_is_a_fault():
    message = refusal({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}, "optimizer": {"type": "auto"}})

    assert 'zero_optimization.sub_group_size is "auto", but nothing on the command line decides it' in message
    assert message.count('optimizer.type is "auto"') == 1 and message.startswith("2 faults:")


# ---- precision


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_a_precision_that_the_hardware_replaced_is_switched_off_in_the_config_too(asked):
    config = {asked: {"enabled": True}}

    found = resolved(config, replace(FLOAT32, precision_was_replaced=True))

    assert found.config[asked]["enabled"] is False
    assert found.notes == (f"mine.json: {asked}.enabled is off for the same reason as the flag",)
    assert f"{asked}.enabled is true, but this run computes in float32: give --{asked} True" in refusal(config, FLOAT32)


def test_a_config_without_precision_gets_the_one_of_the_run():
    assert resolved({}).config["bf16"] == {"enabled": True}
    assert "bf16" not in resolved({}, FLOAT32).config


# ---- anything else

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["auto", "cpu", "nvme"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["enabled", "stage", "x"]), inner),
    max_leaves=5,
)
PLACES = [
    "zero_optimization", "zero_optimization.stage", "zero_optimization.offload_param", "bf16", "fp16", "fp16.enabled",
    "zero_optimization.offload_param.device", "zero_optimization.offload_optimizer.nvme_path", "optimizer.params",
    "zero_optimization.offload_optimizer", "zero_optimization.zero_hpz_partition_size", "train_batch_size", "optimizer",
    "zero_optimization.zero_quantized_weights", "scheduler", "gradient_clipping", "optimizer.params.betas",
]  # fmt: skip


def test_any_value_anywhere_resolves_or_is_a_config_error(tmp_path):
    seen: Counter = Counter()
    names = [name for name in SHIPPED if name in ("zero2_offload", "zero3_nvme", "zeropp")]
    configs = [shipped(name, tmp_path) for name in names]

    @settings(max_examples=250, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(configs), st.sampled_from(PLACES), JSON, st.booleans())
    def check(config, place, value, use_cpu):
        config = copy.deepcopy(config)
        *parents, last = place.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
        try:
            found = resolved(config, use_cpu=use_cpu)
        except ConfigError:
            seen["refused"] += 1
        else:
            assert found.offloads in (True, False)
            seen["resolved"] += 1

    check()
    assert seen["resolved"] > 5 and seen["refused"] > 50


def test_a_number_beyond_all_floats_is_a_mismatch():
    assert "gradient_clipping is 1000" in refusal({"gradient_clipping": 10**400})


def test_what_is_decided_elsewhere_is_said():
    given = {"activation_checkpointing": {"partition_activations": True}}
    assert any("--activation_checkpointing True decides" in note for note in resolved(given).notes)
    assert "sequence_parallel_size is 4, but --sequence_parallel_size is 1" in refusal({"sequence_parallel_size": 4})
    shared = resolved({"zero_optimization": {"stage": 3}}, sequence_parallel_size=2).config
    assert shared["sequence_parallel_size"] == 2 and shared["zero_optimization"]["reduce_scatter"] is True
