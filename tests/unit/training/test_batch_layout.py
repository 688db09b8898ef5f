"""How micro-batches are laid out: as asked, or as the model can take them, which is said."""

from types import SimpleNamespace

import pytest

from finetune.training.dataloaders import BatchLayout, decide_layout
from finetune.utils.errors import ConfigError

ASKED = {"tokens_per_device": None, "per_device_batch": 8, "model_max_length": 512, "sampling": "random"}


def layout(wanted: str, padding: str | None = None, logits: str | None = None, **changed: object) -> BatchLayout:
    return decide_layout(SimpleNamespace(batching=wanted, **{**ASKED, **changed}), 300, padding, logits)


@pytest.mark.parametrize(
    ("wanted", "changed", "form", "said"),
    [
        ("flat", {}, ("flat", True, None, "random"), []),
        ("padded", {}, ("padded", True, None, "random"), []),
        ("packed", {}, ("packed", True, 512, "random"), []),
        ("flat", {"tokens_per_device": 400}, ("flat", True, 400, "random"), []),
        ("flat", {"sampling": "sequential"}, ("flat", True, None, "sequential"), []),
        ("flat", {"sampling": "batch_rebalance"}, ("flat", True, None, "random"), []),
        ("flat", {"sampling": "group_by_length"}, ("flat", True, None, "random"), ["group_by_length is off: flat"]),
        ("padded", {"sampling": "group_by_length"}, ("padded", True, None, "group_by_length"), []),
        (
            "flat",
            {"padding": "why"},
            ("padded", True, None, "random"),
            ["--batching flat: fallback to padded"],
        ),
        ("packed", {"padding": "why"}, ("padded", True, 4096, "random"), ["--batching packed: fallback to padded"]),
        ("padded", {"padding": "why"}, ("padded", True, None, "random"), []),
        ("flat", {"logits": "no"}, ("flat", False, None, "random"), ["logits are computed at all"]),
    ],
)
def test_the_form_is_as_asked_or_said(wanted, changed, form, said):
    found = layout(wanted, **changed)
    assert (found.batching, found.selects_logits, found.capacity, found.order) == form
    assert len(found.notes) == len(said)
    assert all(note.startswith(begin) for note, begin in zip(found.notes, said, strict=True))


def test_a_budget_must_hold_the_longest_example():
    with pytest.raises(ConfigError, match="299: the longest example has 300 tokens"):
        layout("flat", tokens_per_device=299)
    assert layout("flat", tokens_per_device=300).capacity == 300
