"""What the model card says of a run, and what it keeps to itself."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.export.model_card import model_card, write_model_card
from finetune.inference.run_result import RunResult
from tests.helpers.made_results import SUMMARY

RUN: dict[str, Any] = {
    "model": {"name": "org/base", "folder": None, "revision": None, "weights": "0", "fingerprint": "0"},
    "precision": "bf16", "world_size": 1, "versions": {"torch": "2"},
    "arguments": {"lora_r": 32, "lora_alpha": 16, "data_path": ["/home/someone/d.json"], "seed": 42,
                  "deepspeed": "/home/someone/zero.json"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def result(folder: Path = Path("o"), adapter: str | None = "LORA", *, model=None, chat=None, **summary) -> RunResult:
    counts = {**SUMMARY, "rows_by_source": {"/home/someone/d.json": 6}, **summary}
    run = {**RUN, "chat": {"format": "hermes", **(chat or {})}, "data": {"summary": counts, "fingerprint": "0"}}
    return RunResult(folder, {**run, "model": {**RUN["model"], **(model or {})}}, adapter)


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def test_variables_of_the_template_are_named():
    kwargs = {"template_kwargs": {"enable_thinking": False}}
    assert '| Chat template variables | `{"enable_thinking": false}` |' in model_card(result(chat=kwargs))
    assert "variables" not in model_card(result(chat={"template_kwargs": {}}))


@pytest.mark.parametrize(
    ("reasoning", "said"),
    [("learn", "| supervised in 3 "), ("context", "| read, not supervised in 3 "), ("drop", "| left out in 3 ")],
)
def test_whether_reasoning_was_learned_is_said_where_the_data_has_some(reasoning, said):
    assert said in model_card(result(chat={"reasoning": reasoning}, with_reasoning=3))
    assert "Reasoning" not in model_card(result(chat={"reasoning": reasoning}))


def test_data_and_flags_are_named_without_the_folders_of_this_machine(tmp_path):
    (tmp_path / "README.md").write_text("[More Information Needed]")
    write_model_card(result(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "| Data | d.json (6 rows) |" in card and "lora_r: 32\n" in card and "deepspeed: zero.json\n" in card
    for absent in ("/home/someone", "lora_alpha", "seed: ", "More Information"):
        assert absent not in card


def test_the_base_has_its_name_on_the_hub_and_its_license(tmp_path):
    assert front(model_card(result()))["base_model"] == "org/base"
    assert front(model_card(result()))["base_model_relation"] == "adapter"
    merged = front(model_card(result(), merges=True))
    assert (merged["library_name"], merged["base_model_relation"]) == ("transformers", "finetune")
    folder = tmp_path / "models--Qwen--Qwen3-8B/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Qwen")
    found = front(model_card(result(model={"name": str(folder), "folder": str(folder)})))
    assert (found["base_model"], found["license"]) == ("Qwen/Qwen3-8B", "apache-2.0")
    local = model_card(result(model={"name": "x/base", "folder": str(tmp_path / "base")}))
    assert "base_model" not in front(local) and "`base`" in local and str(tmp_path) not in local


def test_an_adapter_is_loaded_on_all_of_a_base_that_reads_images():
    card = model_card(result(model={"auto_class": "AutoModelForMultimodalLM"}))
    assert "AutoModelForMultimodalLM.from_pretrained(" in card and "AutoPeft" not in card
    assert "AutoPeftModelForCausalLM" in model_card(result())
