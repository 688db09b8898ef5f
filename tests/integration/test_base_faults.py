"""A base model that cannot be trained: a run and the doctor end with the same status and say the same."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from finetune import train
from finetune.cli import doctor
from finetune.utils.errors import FinetuneError
from tests.helpers.short_runs import SHORT


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def lacking(folder: Path) -> None:
    weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def misshapen(folder: Path) -> None:
    weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


def unused(folder: Path) -> None:
    weights(folder, lambda tensors: tensors.update({"score.weight": torch.ones(3)}))


def without_head(folder: Path) -> None:
    configure(folder, tie_word_embeddings=False)


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def quantized(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").rename(folder / "adapter_config.json")


def only_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def small_vocabulary(folder: Path) -> None:
    configure(folder, vocab_size=1000)
    weights(
        folder, lambda tensors: tensors.update({name: tensors[name][:1000] for name in ["model.embed_tokens.weight"]})
    )


def few_positions(folder: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=49152)
    GPT2LMHeadModel(config).save_pretrained(folder)


def whole(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("fault", "flags", "said"),
    [
        (lacking, "", "the files lack model.layers.1.mlp.up_proj.weight"),
        (lacking, "--deepspeed zero3", "the files lack model.layers.1.mlp.up_proj.weight"),
        (lacking, "--use_lora True --allow_missing_weights True", "the files lack model.layers.1.mlp.up_proj.weight"),
        (without_head, "", "the files lack lm_head.weight"),
        (without_head, "--use_lora True --allow_missing_weights True", "only layers in --modules_to_save"),
        (misshapen, "--allow_missing_weights True", "model.norm.weight [3] instead of [64]"),
        (unused, "", "LlamaForCausalLM does not use score.weight"),
        (truncated, "", "model.safetensors: cannot be read"),
        (quantized, "", "its weights are quantized (gptq)"),
        (adapter, "", "not the config of an adapter"),
        (only_config, "", "holds no weights"),
        (small_vocabulary, "--use_lora True", "--modules_to_save embed_tokens"),
        (few_positions, "", "has 16 position embeddings"),
        (whole, "--use_lora True --lora_target_modules qkv_proj", "qkv_proj: llama has no such layer"),
    ],
)
def test_a_run_and_the_doctor_agree(
    fault, flags, said, tiny_model, conversation_file, tmp_path, capsys, monkeypatch
):  # fmt: skip
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    fault(base)
    names = ["--model_name_or_path", base, "--data_path", conversation_file, "--output_dir", tmp_path / "output"]
    words = [str(word) for word in (*names, *SHORT, *flags.split(), "--use_cpu", "True")]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "start_watchdog", nullcontext)
    with pytest.raises(FinetuneError) as raised:
        train.run_training(words)
    assert (raised.value.status, str(raised.value).count(said)) == (2, 1), str(raised.value)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        doctor.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    errors = [finding for finding in found["findings"] if finding["status"]]
    assert (ended.value.code, [finding["text"] for finding in errors]) == (2, [str(raised.value)])
