"""The result of a run, opened again: whole and the same, or an error that says what is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.export import verify_saved
from finetune.inference import load_result
from finetune.utils.errors import CheckpointError

IDS = [5, 6, 7, 8, 9, 10]


LABELS = [-100, -100, 7, 8, -100, 10]


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A copy of the tiny model, and its loss on one conversation."""
    folder = tmp_path / "result"
    shutil.copytree(tiny_model, folder)
    return folder, loss_of(AutoModelForCausalLM.from_pretrained(folder))


def verify(folder, loss, precision="float32", base=""):
    return verify_saved.verify_result(
        folder, base=base, input_ids=IDS, labels=LABELS, loss=loss, precision=precision, trust_remote_code=False
    )


def loss_of(model) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=torch.tensor([IDS]), labels=torch.tensor([LABELS])).loss)


def with_lora(base):
    """An adapter that has moved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", lora_alpha=64))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_result_opens_with_the_loss_it_had(saved):
    folder, loss = saved
    assert f"the trained one: {loss:.4f}" in verify(folder, loss)


def scaled(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"] *= 30


def dropped(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def emptied(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.empty(0)


def added(tensors):
    tensors["model.layers.7.mlp.down_proj.weight"] = torch.ones(2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled, "differs from the trained one"),
        (dropped, "the files lack model.layers.1.mlp.down_proj.weight"),
        (emptied, "model.layers.1.mlp.down_proj.weight is empty"),
        (added, "does not use model.layers.7.mlp.down_proj.weight"),
    ],
)
def test_a_result_that_is_not_what_was_trained_is_refused(saved, change, said):
    folder, loss = saved
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=said):
        verify(folder, loss)


def test_a_loss_that_is_no_number_is_never_the_same(saved):
    folder, _ = saved
    with pytest.raises(CheckpointError, match="differs from the trained one"):
        verify(folder, float("nan"))


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model\*.safetensors"):
        verify(tmp_path, 1.0)


def test_where_a_second_copy_does_not_fit_the_weights_are_looked_at_all_the_same(saved, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr(load_result, "free_memory", lambda: 1000)
    assert "its loss was not compared" in verify(folder, 99.0)
    rewrite(folder, emptied)
    with pytest.raises(CheckpointError, match="is empty"):
        verify(folder, 99.0)


def test_the_copy_computes_in_the_precision_of_the_run(tiny_model, tmp_path, monkeypatch):
    """Weights that lie on the disk in bf16 were trained in float32: their loss in bf16 would be another."""
    monkeypatch.setitem(verify_saved.LOSS_TOLERANCES, "float32", 1e-5)  # a model so small differs by little
    base, folder = tmp_path / "base", tmp_path / "adapter"
    sharp = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    sharp.get_input_embeddings().weight.data *= 40  # it is the head too
    sharp.save_pretrained(base)
    model = with_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    model.save_pretrained(folder)
    exact, coarse = loss_of(model), loss_of(model.to(torch.bfloat16))
    assert abs(exact - coarse) > 1e-4 * exact
    assert "the saved adapter loads" in verify(folder, exact, base=str(base))
    with pytest.raises(CheckpointError, match="differs from the trained one"):
        verify(folder, coarse, base=str(base))


def test_an_adapter_is_compared_on_its_base(tiny_model, tmp_path):
    model = with_lora(AutoModelForCausalLM.from_pretrained(tiny_model))
    model.save_pretrained(tmp_path)
    loss = loss_of(model)
    assert "the saved adapter loads" in verify(tmp_path, loss, base=str(tiny_model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    with pytest.raises(CheckpointError, match="differs from the trained one"):
        verify(tmp_path, loss, base=str(tiny_model))
