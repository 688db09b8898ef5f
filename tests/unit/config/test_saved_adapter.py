"""An adapter as the model: its base is found, its shape is kept, and a flag that contradicts it is an error."""

import json
from pathlib import Path

import pytest

from finetune.config import DoctorArguments, parse
from finetune.config.arguments import Arguments
from finetune.launcher import parse_launcher_args
from finetune.preflight import PlannedRun
from finetune.run_dir.run_json import update_run_json
from finetune.utils.errors import ConfigError

LORA = {
    "peft_type": "LORA", "base_model_name_or_path": "someone/base", "revision": "abc", "r": 4, "lora_alpha": 8,
    "lora_dropout": 0.05, "target_modules": ["v_proj", "q_proj"], "use_dora": False, "use_rslora": True,
    "modules_to_save": ["lm_head"], "init_lora_weights": True, "bias": "none",
}  # fmt: skip


def saved(folder: Path, **changed: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **changed}))
    (folder / "adapter_model.safetensors").touch()
    return folder


def parsed(model: Path | str, *words: str) -> Arguments:
    return parse(["--model_name_or_path", str(model), "--data_path", "d", "--output_dir", "o", *words])


def refusal(model: Path | str, *words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parsed(model, *words)
    return str(raised.value)


def test_the_base_and_the_shape_are_those_of_the_adapter(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {saved(tmp_path / 'a')}\nlora_r: 4\n")
    arguments = parse([str(recipe), "data_path=d", "output_dir=o"])
    model, adapter = arguments.model, arguments.adapter
    assert (model.model_name_or_path, model.model_revision) == ("someone/base", "abc")
    assert model.adapter_name_or_path == str(tmp_path / "a")
    assert (adapter.kind(), adapter.lora_r, adapter.lora_alpha, adapter.lora_dropout) == ("lora", 4, 8, 0.05)
    assert (adapter.lora_target_modules, adapter.modules_to_save) == (["q_proj", "v_proj"], ["lm_head"])
    assert adapter.use_rslora and not adapter.use_dora
    again = tmp_path / "run.json"  # a run.json repeats its run
    again.write_text(json.dumps({"arguments": arguments.flat()}))
    assert parse(["--config", str(again)]).adapter == adapter


def test_an_adapter_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    folder, asked = saved(tmp_path / "snapshot"), []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("finetune.utils.hub._is_reachable", lambda endpoint: True)

    def file_exists(repo: str, name: str, revision: str | None) -> bool:
        asked.append((repo, name, revision))
        return repo == "me/adapter"

    monkeypatch.setattr("huggingface_hub.file_exists", file_exists)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: folder)
    arguments = parsed("me/adapter", "--model_revision", "v2")
    assert asked == [("me/adapter", "adapter_config.json", "v2")]
    assert (arguments.model.model_name_or_path, arguments.model.model_revision) == ("someone/base", "abc")
    assert arguments.model.adapter_name_or_path == str(folder)
    assert "continuing the adapter me/adapter" in arguments.notes[0]
    assert parsed("mine", "--adapter_name_or_path", "me/adapter").model.adapter_name_or_path == str(folder)
    assert parsed("me/model").model.adapter_name_or_path is None


def test_virtual_tokens_are_continued_too(tmp_path):
    folder = saved(tmp_path / "a", peft_type="PREFIX_TUNING", num_virtual_tokens=7)
    assert (parsed(folder).adapter.kind(), parsed(folder).adapter.num_virtual_tokens) == ("prefix", 7)


def test_a_moved_base_is_an_error_with_the_flags_that_name_it(tmp_path):
    folder = saved(tmp_path / "a", base_model_name_or_path="/models/gone")
    assert "/models/gone" in (said := refusal(folder)) and f"--adapter_name_or_path {folder}" in said
    assert parsed("elsewhere", "--adapter_name_or_path", str(folder)).model.model_name_or_path == "elsewhere"
    (tmp_path / "base").mkdir()
    update_run_json(folder, {"model": {"folder": str(tmp_path / "base")}})
    assert parsed(folder).model.model_name_or_path == str(tmp_path / "base")
    inside = saved(folder / "checkpoint-4", base_model_name_or_path="gone")
    assert parsed(inside).model.model_name_or_path == str(tmp_path / "base")


def test_flags_that_contradict_the_adapter_are_named_with_both_values(tmp_path):
    words = "--lora_r 16 --lora_target_modules all-linear --use_dora True --init_lora_weights pissa --use_lora False"
    said = refusal(saved(tmp_path / "a"), *words.split())
    for flag, value in {"lora_r 16": "4", "lora_target_modules all-linear": "q_proj v_proj"}.items():
        assert f"--{flag}: the adapter {tmp_path / 'a'} has {value}" in said
    assert "5 faults" in said
    update_run_json(tmp_path / "a", {"arguments": {"lora_target_modules": ["all-linear"], "load_in_4bit": True}})
    arguments = parsed(tmp_path / "a", "--lora_target_modules", "all-linear", "--use_lora")
    assert arguments.adapter.lora_target_modules == ["q_proj", "v_proj"] and arguments.model.load_in_4bit


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "POLY"}, "POLY"),
        ({"peft_type": None}, "not the config of an adapter"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "not the config of an adapter"),
        ({"r": "8"}, "r is '8'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is [5, 6]"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga has changed"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 has changed"),
        ({"base_model_name_or_path": None}, "names no base"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_an_error(tmp_path, changed, said):
    assert said in refusal(saved(tmp_path / "a", **changed))


def test_an_adapter_without_weights_and_a_folder_that_is_none_are_errors(tmp_path):
    (saved(tmp_path / "a") / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model" in refusal(tmp_path / "a")
    assert "holds no adapter_config.json" in refusal("base", "--adapter_name_or_path", str(tmp_path))


def test_other_hosts_need_the_base_too(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    arguments = parsed(saved(tmp_path / "a", base_model_name_or_path=str(base)))
    words = ["--model_name_or_path", str(tmp_path / "a")]
    run = PlannedRun(DoctorArguments(), parse_launcher_args(["finetune.py"]), None, words, arguments)
    assert run.shared_words == [str(tmp_path / "a"), str(base)]
