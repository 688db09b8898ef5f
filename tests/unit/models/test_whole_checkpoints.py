"""Text training of a checkpoint with images keeps all of it: the class, every tensor, and names that fit."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from finetune.config.adapter_arguments import AdapterArguments
from finetune.config.arguments import ModelArguments
from finetune.export.base_tensors import BaseTensors
from finetune.export.merge_plan import MergedTensors, master_tensors, plain_tensors
from finetune.export.weight_names import WeightNames
from finetune.inference.load_result import load_saved_adapter, load_strict
from finetune.models.adapters import attach_peft
from finetune.models.auto_class import auto_class
from finetune.models.embeddings import embedding_names
from finetune.models.freezing import freeze
from finetune.models.loader import freeze_untrained, inspect_model
from finetune.models.module_kinds import VISION
from finetune.models.stored_tensors import StoredTensors, save_tensors
from finetune.preflight.spec_from_config import spec_from_config
from finetune.utils.errors import CheckpointError, ConfigError
from tests.helpers import tiny_models, vision_models
from tests.helpers.tiers import mostly_slow

IDS = torch.arange(3, 15)[None]
families = pytest.mark.parametrize("family", mostly_slow(vision_models.FAMILIES, ["qwen3_5"]))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loaded(folder: Path):
    info = inspect_model(ModelArguments(str(folder)), "eager")
    model = auto_class(info.config).from_pretrained(folder, dtype=torch.float32)
    freeze_untrained(model, info.kinds)
    return info, model


@families
def test_every_tensor_of_the_base_is_in_the_result_and_untouched_ones_are_the_same_bytes(family, tmp_path):
    base = vision_models.save(family, tmp_path / "base")
    info, model = loaded(base)
    kept = BaseTensors(base, info.empty, model)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    changed = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in changed:
                parameter += 0.01

    kept.save(model, tmp_path / "out")

    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    spec = spec_from_config(info.config, precision="float32")
    assert spec.trainable == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert {name: weight.shape for name, weight in before.items()} == {
        name: weight.shape for name, weight in after.items()
    }
    assert kept.untouched
    same = {name for name in before if before[name].dtype == after[name].dtype and before[name].equal(after[name])}
    assert set(kept.untouched) <= same and any(info.kinds.of(name) == VISION for name in kept.frozen)
    report = kept.report(tmp_path / "out", changed)
    assert report["missing"] == report["added"] == 0 and report["changed"] + report["identical"] == len(before)
    assert 0 < report["changed"] <= len(before) - len(same)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]
    again = load_strict(tmp_path / "out", torch.float32, trusts_code=False)
    wanted = model.eval()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(again(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)


@families
def test_an_adapter_is_on_the_text_alone_and_fits_the_whole_model(family, tmp_path):
    base = vision_models.save(family, tmp_path / "base")
    info, model = loaded(base)
    adapted = attach_peft(model, AdapterArguments(use_lora=True))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and not [name for name in trained if info.kinds.of(name) == VISION]
    with torch.no_grad():
        for name in trained:
            adapted.get_parameter(name).normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    assert all("language_model" in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    whole = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    again = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    wanted = adapted.eval()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(again(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)


def test_experts_are_merged_in_the_layout_of_the_files(tmp_path):
    """transformers reads those of Qwen3-VL-MoE in two, and asks the model for their shapes."""
    base = vision_models.save("qwen3_vl_moe", tmp_path / "base")
    stored = tensors_of(base)
    _, model = loaded(base)
    adapted = attach_peft(model, AdapterArguments(use_lora=True))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    _, plain = loaded(base)
    plan = MergedTensors(StoredTensors(base), plain, tmp_path / "adapter", load_saved_adapter)

    merged = {output.name: output.get() for output in plan.outputs()}

    assert {name: weight.shape for name, weight in merged.items()} == {
        name: weight.shape for name, weight in stored.items()
    }
    save_tensors(merged, base / "model.safetensors")
    again = load_strict(base, torch.float32, trusts_code=False)
    wanted = adapted.eval()(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(again(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_model_of_optimizer_states_has_what_was_not_trained_from_the_files(tmp_path):
    base = vision_models.save("qwen3_5", tmp_path / "base")
    info, model = loaded(base)
    stored, names = StoredTensors(base), WeightNames(info.empty)
    names.group_files(stored.shapes())
    trained = {name: weight.detach() + 1 for name, weight in model.named_parameters() if weight.requires_grad}
    masters: Any = SimpleNamespace(shapes={name: weight.shape for name, weight in trained.items()},
                                   get=trained.__getitem__, buffers={})  # fmt: skip

    merged = {output.name: output.get() for output in master_tensors(masters, names, stored)}

    assert merged.keys() == set(stored) and "mtp.fc.weight" in merged
    same = {name for name in stored if torch.equal(merged[name], stored[name])}
    assert same == {name for name in stored if name.startswith(("mtp", "model.visual"))}


@pytest.mark.parametrize(("family", "is_tied"), [("qwen3_vl", False), ("mistral3", True)])
def test_the_config_of_the_whole_model_says_whether_the_head_is_tied(family, is_tied, tmp_path):
    """Qwen3-VL's text config says nothing, that of Mistral 3 the contrary."""
    base = vision_models.save(family, tmp_path / "base")
    _, model = loaded(base)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    assert ("lm_head" in embedding_names(model)) != is_tied
    stored = StoredTensors(base)
    assert len(plain_tensors(stored, model)) == len(stored)


def test_a_result_that_lacks_a_tensor_of_the_base_is_an_error(tmp_path):
    base = vision_models.save("qwen3_5", tmp_path / "base")
    info, model = loaded(base)
    kept = BaseTensors(base, info.empty, model)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"tensors of the base are missing: mtp\.fc\.weight"):
        kept.report(tmp_path / "out", set())


def test_a_base_that_was_saved_with_the_names_of_the_memory_keeps_them(tmp_path):
    """As `save_original_format=False` writes it: a rule of transformers would rename what already has its name."""
    fields = {**tiny_models.SIZES, **tiny_models.GROUPED, **tiny_models.ROUTED}
    config = transformers.LagunaConfig(**fields, head_dim=8, shared_expert_intermediate_size=16)
    transformers.LagunaForCausalLM(config).save_pretrained(tmp_path / "base", save_original_format=False)
    info, model = loaded(tmp_path / "base")
    kept = BaseTensors(tmp_path / "base", info.empty, model)

    kept.save(model, tmp_path / "out")

    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in kept.stored
    assert tensors_of(tmp_path / "out").keys() == set(kept.stored)
    assert kept.report(tmp_path / "out", set())["identical"] == len(kept.stored)


def test_a_checkpoint_of_the_text_alone_is_loaded_as_it_is():
    config = transformers.Qwen3_5Config(architectures=["Qwen3_5ForCausalLM"])
    assert auto_class(config) is transformers.AutoModelForCausalLM
    assert auto_class(transformers.LlamaConfig()) is transformers.AutoModelForCausalLM
    assert auto_class(transformers.Qwen3_5Config()) is transformers.AutoModelForMultimodalLM
    assert auto_class(transformers.T5Gemma2Config()) is transformers.AutoModelForCausalLM  # which refuses it


def test_a_vision_tower_is_nothing_that_text_trains(tmp_path):
    info, model = loaded(vision_models.save("qwen3_5", tmp_path / "base"))
    with pytest.raises(ConfigError, match="--train_only visual: .*text does not train what it names"):
        freeze(model, info.kinds, [], ["visual"])


def test_a_frozen_weight_that_two_modules_share_is_saved_once(tmp_path):
    tiny_models.build("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    info, model = loaded(tmp_path / "base")
    freeze(model, info.kinds, ["embed_tokens"], [])
    kept = BaseTensors(tmp_path / "base", info.empty, model)
    kept.save(model, tmp_path / "out")
    assert kept.untouched == ["model.embed_tokens.weight"]
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tmp_path / "base").keys()
    assert kept.report(tmp_path / "out", set())["added"] == 0


def test_tensors_of_a_bin_file_that_share_memory_are_carried_over_each(tmp_path):
    """As a head that is stored beside the embeddings it is tied to."""
    base = vision_models.save("qwen3_5", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors |= {"mtp.embed.weight": tensors["mtp.fc.weight"], "mtp.norm.weight": tensors["mtp.fc.weight"][0]}
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    info, model = loaded(base)
    kept = BaseTensors(base, info.empty, model)
    kept.save(model, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in tensors if name.startswith("mtp"))


def test_frozen_weights_that_the_base_lacks_are_saved(tmp_path):
    base = tiny_models.build("llama")
    base.save_pretrained(tmp_path / "base", state_dict={k: v for k, v in base.state_dict().items() if "norm" not in k})
    with torch.device("meta"):
        empty = tiny_models.build("llama")
    for name, weight in base.named_parameters():
        weight.requires_grad_("mlp" in name)
    kept = BaseTensors(tmp_path / "base", empty, base)
    assert {name for name in base.state_dict() if "norm" in name or "mlp" in name} == set(
        kept.without_frozen(base.state_dict())
    )
