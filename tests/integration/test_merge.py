"""A large model is merged in the memory of a shard."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch

from finetune.config import AdapterArguments
from finetune.export import merge_plan, model_merge
from finetune.inference.run_result import read_result
from finetune.models.adapters import attach_peft
from finetune.models.lora_targets import ALL_LINEAR, resolve_targets
from finetune.models.model_folder import weights_fingerprint
from finetune.models.stored_tensors import StoredTensors
from finetune.utils.errors import CheckpointError, ConfigError, StorageError
from tests.helpers import made_results as made
from tests.helpers import tiny_models
from tests.helpers.limits import limited_file_size
from tests.helpers.made_results import logits
from tests.helpers.paths import ROOT
from tests.helpers.tiers import mostly_slow


def build(family: str, **changed):
    return tiny_models.build(family, vocab_size=made.ROWS, **changed).eval()


def adapt(model, **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    with warnings.catch_warnings():  # peft's, on what its users should think of; here it is meant
        warnings.simplefilter("ignore")
        return made.with_random_weights(get_peft_model(model, config))


@pytest.fixture
def lora(tmp_path):
    base = made.save_base(build("llama"), tmp_path / "base")
    return made.save_adapter(adapt(build("llama")), base, tmp_path / "output")


LARGE = """
import resource, sys
from pathlib import Path
import torch
from finetune.inference.run_result import read_result
from finetune.export import model_merge
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def plan(folder):
    return model_merge.plan_merge(read_result(folder), folder / "merged", base_name=None, dtype=None)
model_merge.merge_weights(plan(Path(sys.argv[2])), shard_bytes=10**6, verify=False)
before = peak()
merged = model_merge.merge_weights(plan(Path(sys.argv[1])), shard_bytes=16 * 2**20, verify=False)
print(peak() - before, merged.size)
"""


@pytest.mark.faults
def test_a_model_is_merged_in_the_memory_of_a_shard(tmp_path, lora):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8)
    base = made.save_base(build("llama", **sizes), tmp_path / "large")
    made.save_adapter(adapt(build("llama", **sizes)), base, tmp_path / "large-output")
    done = subprocess.run(
        [sys.executable, "-c", LARGE, tmp_path / "large-output", tmp_path / "output"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    growth, size = map(int, done.stdout.split())
    assert size > 350e6
    # A shard, its copy as it is written, and a layer in float32; the adapter itself takes 8 MB.
    assert growth < 120e6, f"{growth / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


SHARD = 20_000  # bytes: several files of a tiny model


def merged(result, target: Path, **options):
    base_name, dtype = options.pop("base_name", None), options.pop("dtype", None)
    plan = model_merge.plan_merge(result, target, base_name=base_name, dtype=dtype)
    return model_merge.merge_weights(plan, shard_bytes=options.pop("shard_bytes", SHARD), **options)


def opened(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model


ATTENTION = dict(target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("family", mostly_slow(tiny_models.FAMILIES, ["llama", "mixtral", "gpt2", "deepseek_v3"]))
def test_an_adapter_on_all_layers_and_experts_in_its_base_is_what_peft_makes_of_both(family, tmp_path):
    base = made.save_base(build(family), tmp_path / "base")
    adapted = adapt(build(family), **resolve_targets(build(family), ALL_LINEAR).options(build(family)))
    result = made.save_adapter(adapted, base, tmp_path / "output")
    wanted = logits(adapted)
    untouched = logits(build(family))

    seen = merged(result, tmp_path / "merged")

    assert "the first choice is the same" in seen.checked
    model = opened(tmp_path / "merged")
    assert (logits(model) - wanted).norm() < 1e-4 * (wanted - wanted.mean()).norm()
    assert (wanted - untouched).norm() > 1e-2 * (wanted - wanted.mean()).norm(), "the adapter did nothing"
    assert set(StoredTensors(tmp_path / "merged")) == set(StoredTensors(base))
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1


VARIANTS = {
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "embeddings": dict(target_modules=["embed_tokens", "q_proj"]),
    "biases": dict(bias="lora_only"),
    "head": dict(modules_to_save=["lm_head"]),
    "both ends": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "some tokens": dict(trainable_token_indices=[5, 6]),
    "pattern": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
}


@pytest.mark.parametrize(
    ("variant", "tied"),
    mostly_slow(
        product(VARIANTS, [True, False]),
        [("dora", False), ("rslora", True), ("embeddings", True), ("both ends", False), ("both ends", True),
         ("some tokens", True), ("head", False)],
    ),
)  # fmt: skip
def test_every_kind_of_lora(variant, tied, tmp_path):
    options = dict(VARIANTS[variant])
    if tied and variant == "both ends":
        options |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    base = made.save_base(build("llama", tie_word_embeddings=tied), tmp_path / "base")
    adapted = adapt(build("llama", tie_word_embeddings=tied), **options)
    result = made.save_adapter(adapted, base, tmp_path / "output")
    wanted = logits(made_again(base, tmp_path / "output"))

    merged(result, tmp_path / "merged")

    assert torch.allclose(logits(opened(tmp_path / "merged")), wanted, atol=1e-4)
    untied = tied and variant in ("embeddings", "head")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is (tied and not untied)


def made_again(base: Path, folder: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


@pytest.mark.parametrize(("stored", "wanted", "tolerance"), [("bf16", "bf16", 0.1), ("bf16", "float32", 1e-4)])
def test_the_precision_of_the_training_is_that_of_the_merged_model_unless_another_is_named(
    stored, wanted, tolerance, tmp_path
):
    base = made.save_base(build("llama").to(torch.bfloat16), tmp_path / "base")
    adapted = adapt(build("llama").to(torch.bfloat16).float())
    result = made.save_adapter(adapted, base, tmp_path / "output", precision=stored)
    expected = logits(made_again(base, tmp_path / "output"))

    merged(result, tmp_path / "merged", dtype=None if wanted == stored else wanted)

    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[wanted]
    tensors = StoredTensors(tmp_path / "merged")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    seen = logits(opened(tmp_path / "merged"))
    assert (seen - expected).norm() < tolerance * (expected - expected.mean()).norm()


def test_what_a_model_keeps_finer_than_the_rest_stays_so(tmp_path):
    model = build("deepseek_v3").to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.data = torch.rand(buffer.shape)
    base = made.save_base(model, tmp_path / "base")
    result = made.save_adapter(
        adapt(build("deepseek_v3"), target_modules=["q_a_proj", "kv_b_proj", "o_proj"]),
        base,
        tmp_path / "output",
        precision="bf16",
    )

    merged(result, tmp_path / "merged")

    kept = StoredTensors(tmp_path / "merged")
    finer = [name for name in kept if kept[name].dtype == torch.float32]
    assert finer and all("e_score_correction_bias" in name for name in finer)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "a prefix adapter is .* not weights of a layer"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 4}, "a prompt adapter is .* not weights of a layer"),
        ({"peft_type": "OSF", "target_modules": ["q_proj"]}, "computed from the weights of its base"),
    ],
)
def test_adapters_that_are_no_weights_are_refused_with_the_reason(options, reason, tmp_path):
    adapted = attach_peft(build("llama"), AdapterArguments(adapter_config=json.dumps(options)))
    result = made.save_adapter(adapted, made.save_base(build("llama"), tmp_path / "base"), tmp_path / "output")

    with pytest.raises(ConfigError, match=reason):
        merged(result, tmp_path / "merged")


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "HIRA", "target_modules": "all-linear"},
        {"peft_type": "VERA", "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=lambda options: options["peft_type"],
)
def test_other_methods_of_peft_are_merged(options, tmp_path):
    base = made.save_base(build("llama"), tmp_path / "base")
    adapted = attach_peft(build("llama"), AdapterArguments(adapter_config=json.dumps(options)))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
    result = made.save_adapter(adapted.eval(), base, tmp_path / "output")
    wanted = logits(adapted)

    merged(result, tmp_path / "merged")

    assert torch.allclose(logits(opened(tmp_path / "merged")), wanted, atol=1e-4)
    assert not torch.allclose(logits(build("llama")), wanted, atol=1e-2), "the adapter did nothing"


def test_another_base_is_refused_and_a_moved_one_is_found(lora, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="its base .*base does not exist: .* --base_model"):
        merged(lora, tmp_path / "merged")

    torch.manual_seed(5)
    other = made.save_base(build("llama", initializer_range=0.3), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"was trained on .*base, .*other holds other weights \(fingerprint"):
        merged(lora, tmp_path / "merged", base_name=str(other))

    merged(lora, tmp_path / "merged", base_name=str(tmp_path / "moved"))
    assert torch.allclose(
        logits(opened(tmp_path / "merged")), logits(made_again(tmp_path / "moved", tmp_path / "output")), atol=1e-4
    )


def test_an_adapter_of_another_size_is_refused_with_one_line(lora, tmp_path):
    small = made.save_base(build("llama"), tmp_path / "base2")
    wide = adapt(build("llama", hidden_size=64))
    result = made.save_adapter(wide, small, tmp_path / "wide")
    with pytest.raises(CheckpointError, match="the adapter does not fit its base: size mismatch") as caught:
        merged(result, tmp_path / "merged")
    assert "\n" not in str(caught.value)


def test_a_disk_that_refuses_leaves_nothing(lora, tmp_path):
    with limited_file_size(10_000), pytest.raises(StorageError, match="merged: cannot be written: File too large"):
        merged(lora, tmp_path / "merged")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(StorageError, match="the merged model takes .* MB, 0 MB are free"):
        merged(lora, tmp_path / "merged")
    assert not list(tmp_path.glob(".merged*"))


def test_a_merge_that_goes_wrong_leaves_nothing(lora, tmp_path, monkeypatch):
    real = merge_plan.MergedTensors._merged

    def one_layer_left_out(self, name, module):
        if "layers.1.mlp.up_proj" not in name:
            return real(self, name, module)
        return {"weight": self._base_value(f"{name}.weight").float()}

    monkeypatch.setattr(merge_plan.MergedTensors, "_merged", one_layer_left_out)
    with pytest.raises(CheckpointError, match="the merged model is not the trained one: their logits differ by .*%"):
        merged(lora, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize("harm", ["cut", "gone", "no tensors"])
def test_weights_that_are_not_whole_are_refused(harm, lora, tmp_path):
    path = tmp_path / "base/model.safetensors"
    text = path.read_bytes()
    if harm == "cut":
        path.write_bytes(text[: len(text) // 2])
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    run = json.loads((tmp_path / "output/run.json").read_text())
    run["model"]["weights"] = weights_fingerprint(str(tmp_path / "base"))
    (tmp_path / "output/run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "base"))):
        merged(read_result(tmp_path / "output"), tmp_path / "merged")


def test_the_folder_is_a_model_that_serves(lora, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    (tmp_path / "base/LICENSE").write_text("of the base")
    # As published bases have it; transformers reads this, and refuses to save it.
    (tmp_path / "base/generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 2}')

    merged(lora, tmp_path / "merged")

    folder = tmp_path / "merged"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == [3, 10 + ord("H"), 10 + ord("i"), 4], "LingoWhale's markers, as a template"
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers") and "3.0000 -> 2.0000" in card and "lora adapter" in card
    assert (folder / "LICENSE").read_text() == "of the base"
    run = json.loads((folder / "run.json").read_text())
    with_temperature = json.loads((folder / "generation_config.json").read_text())
    assert (with_temperature["temperature"], with_temperature["eos_token_id"]) == (0.6, 2), "as the base has it"
    assert run["merged"]["from"] == str(tmp_path / "output")
    assert read_result(folder).adapter is None
