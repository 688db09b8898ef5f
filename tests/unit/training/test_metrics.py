"""What a step logs: operations against a count made while a model runs, rates."""

import json
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from finetune.config.hardware import PEAK_TFLOPS, peak_flops
from finetune.models.module_kinds import module_kinds
from finetune.training import metrics
from finetune.training.metrics import StepMeter, model_flops, peak_memory
from tests.helpers.lora import attach_lora
from tests.helpers.tiers import mostly_slow

LENGTH = 24
SIZE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip
MODELS = {
    "untied": LlamaConfig(**SIZE, tie_word_embeddings=False),
    "tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "experts": MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2),
}


def counted(model) -> int:
    """Operations of one conversation's matrix products, as torch counts them while they run."""
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(LENGTH)[None]
        model(input_ids=ids).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "adapter"),
    mostly_slow(product(MODELS, [False, True]), [("tied", False), ("untied", True), ("experts", True)]),
)
def test_operations_are_those_that_torch_counts(name, adapter):
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager", experts_implementation="eager")
    kinds = module_kinds(model)
    if adapter:
        model = attach_lora(model, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"])
    flops = model_flops(model, kinds)

    # Eager attention computes the whole square of which a token sees half.
    mine = flops.of(tokens=LENGTH, logits=LENGTH, pairs=LENGTH * LENGTH)

    # Nothing asks for the gradient of what goes into the first trained layer: that is all that torch leaves out.
    assert mine == pytest.approx(counted(model), rel=0.08)
    assert flops.per_logit == pytest.approx((4 if adapter else 6) * 300 * 64)


def test_partitioned_parameters_count_whole():
    model = AutoModelForCausalLM.from_config(MODELS["tied"])
    kinds = module_kinds(model)
    whole = model_flops(model, kinds)
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert model_flops(model, kinds) == whole


def test_rates_are_those_of_the_interval():
    meter = StepMeter()
    meter.add(600, 200, 3e9)
    meter.add(400, 100, 1e9)
    meter.since -= 2.0
    rates = meter.rates(peak_flops=10e9)
    assert rates["step_seconds"] == pytest.approx(1.0, abs=0.1)
    assert rates["tokens_per_second"] == pytest.approx(500, rel=0.1)
    assert rates["supervised_tokens_per_second"] == pytest.approx(150, rel=0.1)
    assert rates["mfu"] == pytest.approx(0.2, rel=0.1)
    assert "mfu" not in meter.rates(peak_flops=None)


def test_values_that_are_not_finite_are_written_as_null(tmp_path):
    metrics.append_metrics(tmp_path / "m.jsonl", {"step": 1, "loss": float("nan"), "mfu": 0.5, "other": 1})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "mfu": 0.5}


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989e12),
        ("NVIDIA H100 PCIe", "bf16", None, 756e12),
        ("NVIDIA A100-SXM4-80GB", "float32", True, 156e12),
        ("NVIDIA A100-SXM4-80GB", "float32", None, 19.5e12),
        ("NVIDIA GH200 480GB", "fp16", None, 989e12),
        ("NVIDIA L40S", "bf16", None, 362e12),
        ("NVIDIA L4", "bf16", None, 121e12),
        ("NVIDIA H200 NVL", "bf16", None, 835e12),
        ("NVIDIA H20", "bf16", None, 148e12),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "bf16", None, 504e12),
        ("AMD Instinct MI300X", "bf16", None, 1307e12),
        ("NVIDIA RTX A1000", "bf16", None, None),
        ("NVIDIA T400 4GB", "fp16", None, None),
        ("Unheard-of", "bf16", None, None),
    ],
)
def test_peak_rates_go_by_the_name_of_the_device(name, precision, tf32, expected):
    assert peak_flops(name, precision, tf32) == expected


def test_a_name_is_not_hidden_by_a_shorter_one():
    names = list(PEAK_TFLOPS)
    assert not [(long, short) for number, short in enumerate(names) for long in names[number + 1 :] if short in long]


def test_the_memory_of_a_cpu_run_is_its_own_beside_a_gpu_that_something_has_woken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 1)

    assert peak_memory(torch.device("cpu"))["peak_memory_bytes"] > 2**20
    assert peak_memory(torch.device("cuda", 0)) == {"peak_memory_bytes": 0, "peak_reserved_bytes": 1}
