"""Checkpoints without DeepSpeed hold what is trained, also where the adapter that is saved is made from it."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from finetune.config import AdapterArguments
from finetune.export.verify_saved import TensorDigest, digests_to_save
from finetune.models.adapters import InitialLora, attach_peft
from finetune.models.module_kinds import ATTENTION, HEAD, OTHERS, module_kinds
from finetune.training.trainer import SupervisedTrainer
from tests.helpers import tiny_models

KINDS = {
    "pissa": {"use_lora": True, "lora_dropout": 0.0, "init_lora_weights": "pissa", "lora_target_modules": ["q_proj"]},
    "p-tuning": {"adapter_config": '{"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8}'},
    "projected prefix": {
        "adapter_config": json.dumps(
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}
        )
    },
}


def trainer_of(model: Any, folder: Path, initial: InitialLora | None = None) -> Any:
    trainer = object.__new__(SupervisedTrainer)
    trainer.model, trainer.output_dir, trainer.initial_lora, trainer.base_tensors = model, folder, initial, None
    trainer.args, trainer.is_deepspeed_enabled = SimpleNamespace(should_save=True), False
    trainer.saver = SimpleNamespace(collect_errors=lambda path: nullcontext())
    trainer.trained = {name: [] for name, weight in model.named_parameters() if weight.requires_grad}
    trainer.processing_class = SimpleNamespace(save_pretrained=lambda path: None)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_with_what_it_has_trained(kind, tmp_path):
    model = attach_peft(tiny_models.build("llama"), AdapterArguments(**KINDS[kind]))
    before, fresh = InitialLora(model) if kind == "pissa" else None, copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight))

    trainer_of(model, tmp_path, before)._save(str(tmp_path / "checkpoint-1"))
    trainer_of(fresh, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))

    wanted, resumed = dict(model.named_parameters()), dict(fresh.named_parameters())
    assert all(torch.equal(resumed[name], weight) for name, weight in wanted.items())
    trainer_of(model, tmp_path, before)._save(str(tmp_path))
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("kind", ["p-tuning", "projected prefix"])
def test_the_digest_of_virtual_tokens_is_that_of_the_embeddings_which_are_saved(kind, tmp_path):
    model = attach_peft(tiny_models.build("llama"), AdapterArguments(**KINDS[kind]))
    model.save_pretrained(tmp_path)
    ((name, digest),) = digests_to_save(model).items()
    loaded = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path)
    assert TensorDigest.of(loaded.get_parameter(name)) == digest
    assert digest.shape == tuple(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape)


def test_a_layer_that_is_trained_beside_virtual_tokens_is_compared_and_counted_by_its_kind():
    options = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "modules_to_save": ["lm_head"]}
    base = tiny_models.build("llama")
    kinds = module_kinds(base)
    model = attach_peft(base, AdapterArguments(adapter_config=json.dumps(options)))
    assert sorted(name.split(".")[0] for name in digests_to_save(model)) == ["base_model", "prompt_encoder"]
    counts = kinds.count(model)
    assert (counts[HEAD].trained, counts[OTHERS].trained) == (200 * 32, 3 * 32) and counts[ATTENTION].frozen


@pytest.mark.parametrize("start", ["default", "pissa"])
@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_the_adapter_holds_what_is_trained_and_no_frozen_head(start, saved, tmp_path):
    """peft would add the frozen weights, those that PiSSA has moved, and another loader would take them for its own."""
    targets = ["q_proj", "embed_tokens", *(["lm_head"] if not saved else [])]
    options = {"lora_target_modules": targets, "modules_to_save": saved, "init_lora_weights": start}
    model = attach_peft(tiny_models.build("llama"), AdapterArguments(use_lora=True, lora_dropout=0.0, **options))
    initial = InitialLora(model) if start == "pissa" else None
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.1 * torch.randn_like(weight))

    trainer_of(model, tmp_path, initial)._save(str(tmp_path))

    names = {name.replace(".default", "").replace("modules_to_save.", "") for name in trained}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
    loaded, ids = PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path), torch.arange(3, 15)[None]
    wanted = model.eval()(ids).logits
    torch.testing.assert_close(loaded.eval()(ids).logits, wanted, atol=1e-4, rtol=1e-4)
