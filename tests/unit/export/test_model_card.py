"""What the model card says of the chat format that a model was trained in."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.export.model_files import write_model_card
from finetune.inference.run_result import RunResult
from tests.helpers.made_results import SUMMARY

RUN = {
    "model": {"name": "org/base", "folder": None, "weights": "0", "fingerprint": "0"}, "precision": "bf16",
    "arguments": {}, "world_size": 1, "versions": {}, "data": {"summary": SUMMARY, "fingerprint": "0"},
    "chat": {"format": "hermes"},
}  # fmt: skip


def card(tmp_path, chat, **summary):
    data = {"summary": {**SUMMARY, **summary}, "fingerprint": "0"}
    run = {**RUN, "chat": {"format": "hermes", **chat}, "data": data}
    write_model_card(tmp_path, RunResult(Path("output"), run, "LORA"))
    return (tmp_path / "README.md").read_text(encoding="utf-8")


def test_variables_of_the_template_are_named(tmp_path):
    assert '| Chat template variables | `{"enable_thinking": false}` |' in card(
        tmp_path, {"template_kwargs": {"enable_thinking": False}}
    )
    assert "variables" not in card(tmp_path, {"template_kwargs": {}})


@pytest.mark.parametrize(
    ("reasoning", "said"),
    [("learn", "| supervised in 3 "), ("context", "| read, not supervised in 3 "), ("drop", "| left out in 3 ")],
)
def test_whether_reasoning_was_learned_is_said_where_the_data_has_some(tmp_path, reasoning, said):
    assert said in card(tmp_path, {"reasoning": reasoning}, with_reasoning=3)
    assert "Reasoning" not in card(tmp_path, {"reasoning": reasoning})
