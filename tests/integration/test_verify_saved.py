"""The result of a run, opened again: whole and the same, or an error that says what is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.export import verify_saved
from finetune.export.verify_saved import digests_to_save
from finetune.inference import load_result
from finetune.utils.errors import CheckpointError
from tests.helpers.logs import logged

IDS = [5, 6, 7, 8, 9, 10]


LABELS = [-100, -100, 7, 8, -100, 10]


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A copy of the tiny model, and the model in memory."""
    folder = tmp_path / "result"
    shutil.copytree(tiny_model, folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder)


def verify(folder, model, loss=None, precision="float32", base=""):
    return verify_saved.verify_result(
        folder, base=base, trained=digests_to_save(model), input_ids=IDS, labels=LABELS, precision=precision,
        loss=loss_of(model) if loss is None else loss, trust_remote_code=False,
    )  # fmt: skip


def loss_of(model) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=torch.tensor([IDS]), labels=torch.tensor([LABELS])).loss)


def with_lora(base, **options):
    """An adapter that has moved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", lora_alpha=64, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_result_opens_with_the_tensors_and_the_loss_it_had(saved):
    folder, model = saved
    tensors = len(list(model.parameters()))
    line = f"the {tensors} tensors of the saved model are those in memory; loss over 3 tokens {loss_of(model):.4f}"
    assert verify(folder, model) == line


def moved(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-6


def dropped(tensors):
    del tensors["model.layers.1.mlp.down_proj.weight"]


def emptied(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.empty(0)


def added(tensors):
    tensors["model.layers.7.mlp.down_proj.weight"] = torch.ones(2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (moved, "differs from the trained one: model.layers.1.mlp.down_proj.weight"),
        (dropped, "the files lack model.layers.1.mlp.down_proj.weight"),
        (emptied, "model.layers.1.mlp.down_proj.weight is empty"),
        (added, "does not use model.layers.7.mlp.down_proj.weight"),
    ],
)
def test_a_result_that_is_not_what_was_trained_is_refused(saved, change, said):
    folder, model = saved
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=said):
        verify(folder, model)


@pytest.mark.parametrize(
    ("precision", "factor", "is_said"), [("float32", 1.001, False), ("float32", 1.1, True), ("bf16", 1.05, False)]
)
def test_another_loss_is_noted_as_far_as_the_precision_does_not_explain_it(saved, precision, factor, is_said):
    folder, model = saved
    loss = loss_of(model) * factor
    with logged() as messages:
        line = verify(folder, model, loss, precision=precision)
    assert (f"in memory {loss:.4f}" in line) == is_said == any("see how models are loaded" in text for text in messages)


def test_a_loss_that_is_no_number_is_never_the_same(saved):
    assert "in memory nan" in verify(*saved, float("nan"))


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model\*.safetensors"):
        verify(tmp_path, torch.nn.Linear(1, 1), 1.0)


def test_where_a_second_copy_does_not_fit_the_weights_are_looked_at_all_the_same(saved, monkeypatch):
    folder, model = saved
    monkeypatch.setattr(load_result, "free_memory", lambda: 1000)
    assert "they were not compared" in verify(folder, model)
    rewrite(folder, emptied)
    with pytest.raises(CheckpointError, match="is empty"):
        verify(folder, model)


def test_16_bit_weights_are_compared_exactly_whatever_the_loss(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert "are those in memory" in verify(tmp_path, model, precision="bf16")
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[0, 0] += weight[0, 0].abs() / 64 + 1e-4
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj"):
        verify(tmp_path, model, precision="bf16")


@pytest.mark.parametrize("whole", [None, ["norm"]], ids=["lora", "and-a-norm"])
def test_what_is_trained_in_float32_on_a_16_bit_base_is_compared_exactly(tiny_model, tmp_path, whole):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    model = with_lora(AutoModelForCausalLM.from_pretrained(base), modules_to_save=whole)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() * 1.001
    model.save_pretrained(folder)
    assert "tensors of the saved adapter are those in memory" in verify(folder, model, 1.0, "bf16", str(base))


def test_an_adapter_is_compared_on_its_base(tiny_model, tmp_path):
    model = with_lora(AutoModelForCausalLM.from_pretrained(tiny_model))
    model.save_pretrained(tmp_path)
    assert "in memory " not in verify(tmp_path, model, base=str(tiny_model)).replace("are those in memory", "")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    assert f"in memory {loss_of(model):.4f}" in verify(tmp_path, model, base=str(tiny_model))
