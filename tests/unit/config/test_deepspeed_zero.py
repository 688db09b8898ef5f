"""What a config says of ZeRO: saving, stages, offloading, ZeRO++."""

import json
from dataclasses import replace

import pytest

from tests.helpers.deepspeed_configs import COMMAND, FLOAT32, refusal, resolved, shipped


@pytest.mark.parametrize("given_value", [None, False, "auto"])
def test_stage_3_always_gathers_the_weights_it_saves(given_value):
    zero = {"stage": 3}
    if given_value is not None:
        zero["stage3_gather_16bit_weights_on_model_save"] = given_value

    found = resolved({"zero_optimization": zero})

    assert found.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert len(found.notes) == 1 and "is switched on" in found.notes[0]


def test_other_stages_have_nothing_to_gather():
    found = resolved({"zero_optimization": {"stage": 2}})

    assert found.config["zero_optimization"] == {"stage": 2}
    assert found.notes == ()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("key", "value", "off"),
    [
        ("offload_param", {"device": "cpu"}, {"device": "none"}),
        ("offload_optimizer", {"device": "nvme", "nvme_path": "/"}, {"device": "none"}),
        ("zero_quantized_weights", True, False),
        ("zero_hpz_partition_size", 2, 1),
    ],
)
def test_what_only_stage_3_does_is_refused_at_others(stage, key, value, off):
    message = refusal({"zero_optimization": {"stage": stage, key: value}})

    assert message.startswith(f"mine.json: {key}")
    assert message.endswith(f" needs ZeRO stage 3, but zero_optimization.stage is {stage}")
    assert not resolved({"zero_optimization": {"stage": stage, key: off}}).offloads
    assert resolved({"zero_optimization": {"stage": 3, key: value}})


def test_no_optimizer_is_offloaded_without_zero():
    config = {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}
    assert "offload_optimizer needs ZeRO stage 1 or 2 or 3" in refusal(config)


@pytest.mark.parametrize(
    "offload",
    ["cpu", True, ["cpu"], {"device": "disk"}, {"device": "nvme"}, {"device": "nvme", "nvme_path": 5}],
    ids=["text", "boolean", "array", "unknown-device", "no-path", "path-is-a-number"],
)
@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_an_offload_that_deepspeed_could_not_use_is_a_fault(key, offload):
    assert f"{key}" in refusal({"zero_optimization": {"stage": 3, key: offload}})


def test_a_missing_nvme_folder_is_a_fault_of_each_section_that_names_it(tmp_path):
    message = refusal(shipped("zero3_nvme", tmp_path / "missing"))

    for key in ("offload_optimizer", "offload_param"):
        assert f'{key}.nvme_path is "{tmp_path / "missing"}", which is no folder on this host' in message
    assert resolved(shipped("zero3_nvme", tmp_path)).offloads


@pytest.mark.parametrize("size", [3, 8, 0, "2", 2.0, True])
def test_the_second_copy_of_the_weights_divides_the_ranks(size):
    message = refusal({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}}, ranks=4)

    assert f"zero_hpz_partition_size is {json.dumps(size)}, which does not divide the 4 ranks" in message


def test_the_second_copy_of_the_weights_is_one_host_s_ranks():
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}

    found = resolved(config, ranks=8, local_world_size=4)

    assert found.config["zero_optimization"]["zero_hpz_partition_size"] == 4


def test_hosts_with_unequal_ranks_cannot_hold_the_second_copy():
    """4 ranks here and 2 elsewhere: DeepSpeed would find out only after the model is loaded."""
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}

    message = refusal(config, ranks=6, local_world_size=4)

    assert "zero_hpz_partition_size" in message and "6 ranks" in message


def test_a_cpu_turns_quantised_communication_off_and_says_so(tmp_path):
    config = shipped("zeropp", tmp_path)

    on_cpu, on_gpu = resolved(config, use_cpu=True), resolved(config)

    assert on_cpu.config["zero_optimization"]["zero_quantized_weights"] is False
    assert on_gpu.config["zero_optimization"]["zero_quantized_weights"] is True
    assert (on_cpu.notes, on_gpu.notes) == (("mine.json: zero_quantized_weights is off: its kernels need a GPU",), ())


def test_gradients_are_quantised_in_fp16_only():
    """The kernel reads two bytes of each gradient as fp16, whatever they are."""
    config = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}
    fp16 = replace(COMMAND, precision="fp16")

    assert resolved(config, fp16).config["zero_optimization"]["zero_quantized_gradients"] is True
    assert "gradients are bf16, which" in refusal(config)
    assert "gradients are float32, which" in refusal(config, FLOAT32)
    assert "gradients are fp32, which" in refusal({**config, "communication_data_type": "fp32"}, fp16)
    assert "gradients are bf16, which" in refusal({**config, "communication_data_type": "fp16"})


@pytest.mark.parametrize(
    ("accumulation", "given", "is_said"), [(15, None, False), (16, None, True), (64, "fp32", False)]
)
def test_many_gradients_are_better_summed_in_float32(accumulation, given, is_said):
    config = {"zero_optimization": {"stage": 2}} | ({"data_types": {"grad_accum_dtype": given}} if given else {})
    found = resolved(config, replace(COMMAND, gradient_accumulation_steps=accumulation))
    assert any("grad_accum_dtype" in note for note in found.notes) == is_said
