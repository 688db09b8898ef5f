"""A base model that is not whole is refused by name before its weights are read; one that is whole never is."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune.config.arguments import ModelArguments
from finetune.models import loader
from finetune.models.base_checks import check_finite, check_weights, is_finite
from finetune.models.stored_tensors import StoredTensors
from finetune.utils.errors import CheckpointError, ConfigError
from tests.helpers import tiny_models, vision_models
from tests.helpers.tiers import mostly_slow
from tests.helpers.tiny_models import EXPERTS, GROUPED, WIDE_HEADS

MORE_FAMILIES = {
    "qwen2": ("Qwen2", GROUPED),
    "qwen3_moe": ("Qwen3Moe", dict(**WIDE_HEADS, **EXPERTS, num_experts=4, moe_intermediate_size=16)),
    "glm4_moe": (
        "Glm4Moe",
        dict(
            **WIDE_HEADS, **EXPERTS, n_routed_experts=4, moe_intermediate_size=16, n_shared_experts=1,
            first_k_dense_replace=1, n_group=1, topk_group=1,
        ),
    ),
    "olmo2": ("Olmo2", GROUPED),
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def save(tmp_path, monkeypatch) -> Callable[..., tuple[Path, Tensors]]:
    """Save a tiny model of a family; returns its folder and its tensors."""

    def saved(family: str = "llama", **changed: Any) -> tuple[Path, Tensors]:
        monkeypatch.setattr(tiny_models, "FAMILIES", {**tiny_models.FAMILIES, **MORE_FAMILIES})
        tiny_models.build(family, **changed).save_pretrained(tmp_path / family)
        return tmp_path / family, load_file(tmp_path / family / "model.safetensors")

    return saved


def write(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def inspect(folder: Path, **options: Any) -> loader.ModelInfo:
    return loader.inspect_model(ModelArguments(str(folder)), "eager", **options)


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        inspect(folder, **options)
    message = str(raised.value)
    assert message.count("\n") == 0 and folder.name in message
    return message


@pytest.mark.parametrize(
    "family",
    mostly_slow(
        [*tiny_models.FAMILIES, *MORE_FAMILIES, "qwen4_exp"],
        ["llama", "gpt2", "gpt_oss", "deepseek_v3", "qwen2", "qwen4_exp"],
    ),
)
def test_a_saved_model_passes_and_without_any_one_tensor_is_refused_by_its_name(save, family):
    folder, tensors = save(family)
    assert inspect(folder).notes == ()
    for name in random.Random(family).sample([name for name in tensors if name != "embed_out.weight"], 3):
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        write(folder, others)
        assert f"the files lack {name}:" in refused(folder)
        write(folder, {**others, f"{name}_renamed": tensors[name]})
        assert f"the files lack {name};" in refused(folder)
        write(folder, {**others, name: torch.zeros([size + 1 for size in tensors[name].shape])})
        assert f"of another shape are {name} [" in refused(folder)


def test_all_faults_are_named_at_once_and_many_are_counted(save):
    folder, tensors = save()
    for name in sorted(tensors)[:10]:
        del tensors[name]
    tensors["score.weight"] = torch.zeros(2, 32)
    tensors["model.norm.weight"] = torch.zeros(7)
    write(folder, tensors)
    message = refused(folder)
    assert "and 2 more; LlamaForCausalLM does not use score.weight;" in message
    assert "model.norm.weight [7] instead of [32]" in message


def test_a_new_head_starts_at_random_where_that_is_asked_for_and_is_named(save):
    folder, tensors = save()
    head = tensors.pop("lm_head.weight")
    write(folder, {**tensors, "score.weight": torch.zeros(2, 32)})
    assert "lm_head.weight" in refused(folder)
    for may_miss in (None, ("lm_head",)):
        lines = " ".join(inspect(folder, may_miss=may_miss).notes)
        assert "so they start at random: lm_head.weight" in lines and "does not use score.weight" in lines
    write(folder, {**tensors, "lm_head.weight": head[:3]})
    assert "lm_head.weight [3, 32]" in refused(folder, may_miss=None)


def test_what_transformers_ties_ignores_or_computes_is_no_fault(save):
    folder, tensors = save(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors and inspect(folder).notes == ()
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone(), **rotary})
    assert inspect(folder).notes == ()
    folder, tensors = save("gpt2")  # as published: without the prefix, with causal masks
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{layer}.attn.{name}": torch.ones(1) for layer in (0, 1) for name in ("bias", "masked_bias")}
    write(folder, {**bare, **masks})
    assert inspect(folder).notes == ()


class OwnCode(transformers.LlamaForCausalLM):
    """A model with code of its own, which saves no heads that it does not use, and no frequencies that it computes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("inv_freq", torch.ones(3))


def test_a_model_with_code_of_its_own_may_compute_a_buffer_and_leave_tensors_unused(save):
    folder, tensors = save()
    write(folder, {**tensors, "mtp.weight": torch.ones(1)})

    def notes() -> list[str]:
        with torch.device("meta"):
            empty = OwnCode(config)
        return check_weights(folder, empty, empty.config, label="M")

    config = transformers.AutoConfig.from_pretrained(folder)
    assert notes() == ["OwnCode does not use mtp.weight"]
    write(folder, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    with pytest.raises(ConfigError, match=r"the files lack lm_head\.weight"):
        notes()


def test_a_vision_tower_is_part_of_the_model_unless_the_config_names_its_text_alone(tmp_path):
    folder = vision_models.save("qwen3_5", tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    assert inspect(folder).notes == ()
    write(folder, {name: tensor for name, tensor in tensors.items() if name != "model.visual.merger.norm.weight"})
    assert "model.visual.merger.norm.weight" in refused(folder)
    write(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3_5ForCausalLM"]}))
    assert type(inspect(folder).empty).__name__ == "Qwen3_5ForCausalLM"


class TestFiles:
    @pytest.fixture
    def sharded(self, save) -> tuple[Path, list[str], dict[str, str]]:
        """A model in shards: folder, file names, tensor -> file."""
        folder, _ = save()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        loaded.save_pretrained(folder, max_shard_size="20KB")
        places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert inspect(folder).notes == () and len(set(places.values())) > 2
        return folder, sorted(set(places.values())), places

    def test_shards_that_are_missing_or_truncated_are_named(self, sharded):
        folder, names, _ = sharded
        os.truncate(folder / names[1], (folder / names[1]).stat().st_size - 1)
        assert f"{names[1]}: cannot be read: " in refused(folder)
        for name in names[:2]:
            (folder / name).unlink()
        assert f"names files that are missing: {names[0]}, {names[1]}" in refused(folder)

    def test_of_a_model_on_the_hub_shards_that_are_not_in_the_cache_yet_are_no_fault(
        self, sharded, tmp_path, monkeypatch
    ):
        folder, names, _ = sharded
        snapshot = tmp_path / "cache/models--someone--base/snapshots" / ("a" * 40)
        shutil.copytree(folder, snapshot)
        (tmp_path / "cache/models--someone--base/refs").mkdir()
        (tmp_path / "cache/models--someone--base/refs/main").write_text("a" * 40)
        for module in (huggingface_hub.constants, transformers.utils.hub.constants):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache"))
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(loader, "use_cache_if_hub_unreachable", lambda: None)
        os.truncate(snapshot / names[1], 9)
        assert "cannot be read" in refused(Path("someone/base"))
        (snapshot / names[1]).unlink()
        assert inspect(Path("someone/base")).notes == ()

    def test_a_pointer_of_git_lfs_is_named_as_such(self, save):
        folder, _ = save()
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
        assert "run git lfs pull" in refused(folder)

    def test_a_file_of_another_user_is_named_as_such(self, save, monkeypatch):
        folder, _ = save()
        plain = Path.open

        def refuse(path, *args, **kwargs):
            if path.suffix == ".safetensors":
                raise PermissionError(errno.EACCES, "Permission denied")
            return plain(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refuse)
        assert "model.safetensors: cannot be read: Permission denied" in refused(folder)

    def test_an_index_that_disagrees_with_its_files_is_refused(self, sharded):
        folder, names, places = sharded
        index = folder / "model.safetensors.index.json"
        tensor = next(name for name, place in places.items() if place == names[0])
        index.write_text(json.dumps({"weight_map": {**places, tensor: names[1]}}))
        assert f"do not hold: {tensor} in {names[1]}:" in refused(folder)
        for text in ("{", "[]", '{"weight_map": 3}'):
            index.write_text(text)
            assert "not an index of weights" in refused(folder)

    @pytest.mark.parametrize("modern", [True, False])
    def test_files_of_torch_are_read_without_running_code(self, save, modern, tmp_path):
        folder, tensors = save()
        (folder / "model.safetensors").unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=modern)
        assert inspect(folder).notes == ()
        torch.save({**tensors, "model.norm.weight": torch.ones(3)}, path, _use_new_zipfile_serialization=modern)
        assert "model.norm.weight [3] instead of [32]" in refused(folder)
        torch.save({"model.norm.weight": _Runs()}, path, _use_new_zipfile_serialization=modern)
        assert "pytorch_model.bin: cannot be read" in refused(folder)


class _Runs:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("unpickled code ran",)


class TestFolders:
    def test_what_is_no_model_is_named_for_what_it_is(self, save, tmp_path):
        folder, _ = save()
        assert "is a file" in refused(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "llama.gguf")
        assert "holds no weights" in refused(folder) and "llama.gguf" in refused(folder)
        (folder / "latest").write_text("global_step3")
        assert "is a checkpoint of DeepSpeed" in refused(folder)
        (folder / "adapter_config.json").write_text("{}")
        message = refused(folder)
        assert "is an adapter" in message and "finetune merge" in message
        (tmp_path / "empty").mkdir()
        assert "holds no config.json" in refused(tmp_path / "empty")

    @pytest.mark.parametrize(
        ("quantization", "method"),
        [
            ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
            ({"quant_method": "awq", "bits": 4}, "awq"),
        ],
    )
    def test_quantized_weights_are_refused_in_one_sentence(self, save, quantization, method):
        folder, tensors = save()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        write(folder, {"model.layers.0.self_attn.q_proj.qweight": torch.ones(1), **tensors})
        assert f"its weights are quantized ({method})" in refused(folder)


class TestValues:
    def test_values_that_are_not_finite_are_named_with_their_file(self, save):
        folder, tensors = save()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        check_finite(model, folder, label="M")
        tensors["model.norm.weight"][3] = float("nan")
        assert not any(is_finite(tensors["model.norm.weight"].to(dtype)) for dtype in (torch.bfloat16, torch.float16))
        tensors["model.layers.1.mlp.up_proj.weight"][2, 2] = float("-inf")
        write(folder, tensors)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ConfigError) as raised:
            check_finite(model, folder, label="M")
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            assert f"{name} in model.safetensors" in str(raised.value)

    def test_values_that_only_fp16_cannot_hold_are_no_fault_of_the_files(self, save):
        folder, tensors = save()
        tensors["model.norm.weight"][3] = 1e5
        write(folder, tensors)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
        with pytest.raises(ConfigError, match=r"overflow in float16.*model\.norm\.weight: train in bf16"):
            check_finite(model, folder, label="M")


def test_a_saved_result_has_the_status_of_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        StoredTensors(tmp_path)
