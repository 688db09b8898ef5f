"""Digests tell which weights changed; a frozen one that did is an error, a kind that did not is named."""

from types import SimpleNamespace

import pytest
import torch

from finetune.models.module_kinds import module_kinds
from finetune.training.weight_proof import WeightProof
from finetune.utils.errors import CheckpointError
from tests.helpers import tiny_models
from tests.helpers.lora import attach_lora


@pytest.fixture
def proof():
    base = tiny_models.build("mixtral", dtype=torch.bfloat16)
    kinds = module_kinds(base)
    return WeightProof(attach_lora(base, r=2, alpha=4, dropout=None, target_modules=["all-linear"]), kinds)


def change(model, part: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.flatten()[-1] += 1


def test_tensors_are_counted_by_kind_and_a_kind_without_a_change_is_named(proof):
    change(proof.model, "self_attn.q_proj.lora_B")
    changes = proof.compare()
    assert changes.by_kind["attention"] == {"trained": 16, "changed": 2, "frozen": 8}
    assert changes.by_kind["router"] == {"trained": 0, "changed": 0, "frozen": 2}
    (warning,) = changes.warnings()
    assert "no weight of the routed experts changed" in warning
    assert changes.line() == "2 of 24 trained tensors changed, 21 frozen ones did not"


def test_a_frozen_weight_that_changed_is_an_error_with_its_name(proof):
    change(proof.model, "layers.1.mlp.gate.weight")
    with pytest.raises(CheckpointError, match=r"frozen changed in training: .*layers\.1\.mlp\.gate\.weight"):
        proof.compare()


def test_partitions_that_come_from_nvme_between_are_not_taken_for_changed(proof):
    """Of frozen weights DeepSpeed may hold other ones in memory at the end than at the start."""
    weight = proof.model.get_parameter("base_model.model.model.layers.1.mlp.gate.weight")
    weight.ds_tensor = SimpleNamespace(data=weight.data, status=SimpleNamespace(name="NOT_AVAILABLE"))
    assert proof.compare().by_kind["router"]["frozen"] == 2
    change(proof.model, "layers.0.mlp.gate.weight")
    with pytest.raises(CheckpointError, match="layers.0.mlp.gate.weight"):
        proof.compare()
