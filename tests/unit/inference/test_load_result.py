"""The base of a result: where it lies, what of it is fetched, and that it is the one that was trained."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import peft_model
from safetensors.torch import load_file, save_file

from finetune.inference import load_result
from finetune.inference.run_result import RunResult, read_result
from finetune.models.model_folder import weight_files, weights_fingerprint
from finetune.utils.errors import CheckpointError, ConfigError
from tests.helpers import made_results as made
from tests.helpers import tiny_models
from tests.helpers.lora import attach_lora

NAME, COMMIT = "someone/base", "0123456789abcdef0123456789abcdef01234567"
BESIDE = ("consolidated.safetensors", "model.gguf", "onnx/model.onnx", "original/model.safetensors", "README.md")


@pytest.fixture
def published(tmp_path):
    """A repository as hubs hold it: the weights in several formats, in bf16."""
    model = tiny_models.build("llama", vocab_size=made.ROWS).to(torch.bfloat16)
    folder = made.save_base(model, tmp_path / "published")
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")
    for name in BESIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """The hub that has it, and a cache; what is downloaded is what the patterns say."""
    snapshot = tmp_path / f"cache/models--{NAME.replace('/', '--')}/snapshots/{COMMIT}"

    def download(name, *, revision, allow_patterns):
        assert (name, revision) == (NAME, COMMIT)
        found = [str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()]
        for one in huggingface_hub.utils.filter_repo_objects(found, allow_patterns=allow_patterns):
            (snapshot / one).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(published / one, snapshot / one)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return snapshot


def trained_on(published: Path, tmp_path: Path) -> RunResult:
    run = made.run_of(published)
    run["model"] |= {"name": NAME, "folder": None, "revision": COMMIT}
    return RunResult(tmp_path / "output", run, "LORA")


def test_of_a_base_on_the_hub_only_what_loads_is_fetched(published, hub, tmp_path):
    assert load_result.base_folder(trained_on(published, tmp_path)) == hub
    names = {path.name for path in hub.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin", "model.gguf", "onnx", "original", "README.md"}


def test_weights_in_the_old_format_are_fetched_where_there_are_no_others(published, hub, tmp_path):
    (published / "model.safetensors").unlink()
    assert load_result.base_folder(trained_on(published, tmp_path)) == hub
    assert weight_files(hub) == [hub / "pytorch_model.bin"]


def test_a_base_that_has_changed_on_the_hub_is_refused_whoever_asks(published, hub, tmp_path):
    result = trained_on(published, tmp_path)
    result.run["model"]["weights"] = "0" * 32
    with pytest.raises(CheckpointError, match="was trained on someone/base, .* holds other weights"):
        load_result.load_base(result, made.byte_tokenizer())


def test_a_base_whose_float32_would_not_fit_is_loaded_as_it_is_stored_from_the_hub_too(
    published, hub, tmp_path, monkeypatch
):
    result = trained_on(published, tmp_path)
    assert load_result.load_base(result, made.byte_tokenizer()).dtype == torch.float32
    monkeypatch.setattr(load_result, "free_memory", lambda: 1000)
    assert load_result.load_base(result, made.byte_tokenizer()).dtype == torch.bfloat16


def test_a_folder_named_from_home_is_found(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_result.base_folder(trained_on(published, tmp_path), "~/published") == published


@pytest.mark.parametrize(("name", "error"), [("nowhere", ConfigError), ("empty", CheckpointError)])
def test_a_folder_that_is_no_model_is_refused(name, error, published, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=f"its base .*{name}.* with --base_model"):
        load_result.base_folder(trained_on(published, tmp_path), str(tmp_path / name))


# ---- which files hold the weights


def test_the_weights_are_those_that_transformers_would_read(tmp_path):
    (tmp_path / "consolidated.safetensors").write_text("another format")
    assert weight_files(tmp_path) == []
    (tmp_path / "pytorch_model.bin").write_text("old")
    assert weight_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"b": shards[1], "a": shards[0], "c": shards[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(tmp_path) == [tmp_path / one for one in shards]
    (tmp_path / "model.safetensors").write_text("one file")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_model_of_which_a_shard_is_missing_has_no_fingerprint_yet(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_text("a")
    assert weights_fingerprint(str(tmp_path)) is None
    (tmp_path / "model-2.safetensors").write_text("b")
    whole = weights_fingerprint(str(tmp_path))
    (tmp_path / "consolidated.safetensors").write_text("the same in another format")
    assert whole is not None and weights_fingerprint(str(tmp_path)) == whole


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_model_whose_files_lack_a_weight_is_not_loaded_with_a_random_one(published, name):
    tensors = load_file(published / "model.safetensors")
    del tensors[name]
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the files lack {name}"):
        load_result.load_for_inference(RunResult(published, made.run_of(published), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_computes_where_and_in_what_its_base_does(dtype, tmp_path, monkeypatch):
    """peft would take a GPU: but a merge computes on the CPU beside it, and a rank of several has its own."""
    options = dict(r=2, alpha=4, dropout=0.0, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapted = made.with_random_weights(attach_lora(tiny_models.build("llama", vocab_size=made.ROWS), **options))
    adapted.save_pretrained(tmp_path)
    monkeypatch.setattr(peft_model, "infer_device", lambda: "meta")

    loaded = load_result.load_saved_adapter(tiny_models.build("llama", vocab_size=made.ROWS, dtype=dtype), tmp_path)

    assert {weight.device.type for weight in loaded.parameters()} == {"cpu"}
    difference = (made.logits(loaded) - made.logits(adapted)).abs().max()
    assert difference <= (0 if dtype == torch.float32 else 0.05) * made.logits(adapted).abs().max()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_model.safetensors", b"half", "adapter_model.safetensors: cannot be read"),
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors or adapter_model.bin"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "8"}', "r is '8' in adapter_config.json"),
        ("adapter_config.json", None, "holds no adapter_config.json or config.json, though its run is complete"),
    ],
)
def test_a_damaged_adapter_is_named_before_its_base_is_loaded(file, content, said, tmp_path):
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0}
    run = {"model": {"name": "m"}, "chat": {"format": "lingowhale"}, "precision": "bf16"}
    for name, values in (("adapter_config.json", config), ("run.json", run)):
        (tmp_path / name).write_text(json.dumps(values))
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "RUN_COMPLETE").touch()
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read_result(tmp_path)
    assert said in str(refused.value)
