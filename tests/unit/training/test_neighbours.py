"""What is said of padded batches in which a conversation changes the losses of those beside it."""

from types import SimpleNamespace
from typing import Any

import pytest

from finetune.training.dataloaders import neighbours_note
from tests.helpers import tiny_models

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("changed", "longest", "is_said"),
    [({}, 11, True), ({}, 10, False), ({"batching": "flat"}, 11, False), ({"per_device_batch": 1}, 11, False),
     ({"per_device_batch": 1, "tokens_per_device": 99}, 11, True)],
)  # fmt: skip
def test_a_rotation_that_the_longest_row_decides_is_said(changed, longest, is_said):
    model = tiny_models.build("llama", max_position_embeddings=10, rope_parameters=DYNAMIC)
    batch: Any = SimpleNamespace(**{
        "batching": "padded", "per_device_batch": 4, "per_device_eval_batch": 1, "tokens_per_device": None, **changed,
    })  # fmt: skip
    note = neighbours_note(batch, model, longest)
    assert (note is not None) == is_said
    assert not is_said or "depends on the longest conversation" in note
