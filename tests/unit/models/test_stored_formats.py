"""Checkpoints whose weights are stored quantized: dequantized while they load, or refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config import AdapterArguments, ModelArguments
from finetune.export.verify_saved import _load_adapter, digests_to_save, verify_result
from finetune.models.adapters import attach_adapter
from finetune.models.base_checks import check_weights
from finetune.models.loader import inspect_model, load_model
from finetune.models.quantization import base_bits
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models
from tests.helpers.byte_tokenizer import byte_tokenizer

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 16  # of FP8 scales
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head", "gate"]}
FP8_WEIGHTS = [f"{name}.weight" for name in ("proj", "w1", "w2", "w3")]
METHODS = {
    "gpt_oss": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    "llama": FP8,
    "mixtral": FP8,  # files have a tensor for each expert
}


def load_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def mxfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Blocks of 32 values of 4 bits with a scale each, as gpt-oss is published (OCP MX 1.0); and the values."""
    experts, inputs, outputs = weight.shape
    parts = weight.transpose(1, 2).reshape(experts, outputs, inputs // 32, 32)
    exponents = parts.abs().amax(-1, keepdim=True).clamp_min(1e-8).log2().floor() - 2
    codes = (parts / 2**exponents).unsqueeze(-1).sub(FP4).abs().argmin(-1).to(torch.uint8)
    values = (FP4[codes.long()] * 2**exponents).reshape(experts, outputs, inputs).transpose(1, 2)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {"_blocks": blocks, "_scales": (exponents.squeeze(-1) + 127).to(torch.uint8)}, values


def fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Values of 8 bits with a scale for each block, as DeepSeek-V3 is published; and the values."""
    rows, columns = weight.shape
    scales = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).abs().amax((1, 3)) / 448
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    packed = (weight / whole).to(torch.float8_e4m3fn)
    return {"": packed, "_scale_inv": scales}, packed.float() * whole


def published(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write a made-up checkpoint in its format; return the values of its tensors."""
    tiny_models.build(family, vocab_size=272, intermediate_size=64).save_pretrained(folder)
    is_mxfp4 = family == "gpt_oss"
    quantize, ends = (mxfp4, ("gate_up_proj", "down_proj")) if is_mxfp4 else (fp8, tuple(FP8_WEIGHTS))
    tensors, values = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        parts, values[name] = quantize(weight) if name.endswith(ends) else ({"": weight}, weight)
        tensors |= {name + end: part.contiguous().clone() for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    config = {**load_config(folder), "quantization_config": METHODS[family]}
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("family", METHODS)
def test_dequantized_weights_are_trained_and_saved_as_plain_ones(family, tmp_path):
    values = published(family, tmp_path / "base")
    info = inspect_model(ModelArguments(model_name_or_path=str(tmp_path / "base")), "sdpa")
    assert any("dequantized while they load" in note for note in info.notes) and info.bits is None

    model = load_model(info, byte_tokenizer(), "float32", None)

    assert {str(weight.dtype) for weight in model.parameters()} == {"torch.float32"}
    model.save_pretrained(tmp_path / "whole")  # plain weights under the names of the base
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert saved.keys() == values.keys() and "quantization_config" not in load_config(tmp_path / "whole")
    for name, weight in saved.items():
        torch.testing.assert_close(weight, values[name], rtol=1e-6, atol=1e-7)
    adapted = attach_adapter(model, AdapterArguments(use_lora=True, lora_dropout=0.0), info, None, seed=0)
    ids = torch.arange(5, 25)[None]
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    loss = adapted.eval()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(weight.grad is not None for name, weight in adapted.named_parameters() if "lora_A" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    row = ids[0].tolist()
    verified = verify_result(
        tmp_path / "adapter", base=tmp_path / "base", trained=digests_to_save(adapted), input_ids=row, labels=row,
        loss=loss.item(), precision="float32", trust_remote_code=False,
    )  # fmt: skip
    assert "are those in memory" in verified


def test_a_base_that_is_packed_is_not_loaded_a_second_time_on_the_gpu(tmp_path, monkeypatch):
    """transformers would put it beside the trained model, which the GPU may have no room for."""
    given: list[dict] = []
    monkeypatch.setattr(
        "peft.AutoPeftModelForCausalLM.from_pretrained", lambda folder, **options: given.append(options)
    )
    tiny_models.build("llama").save_pretrained(tmp_path)
    for bits in (None, 4):
        _load_adapter(tmp_path, str(tmp_path), torch.float32, False, bits)
    assert [options.get("device_map") for options in given] == [None, {"": "cpu"}]


def test_layers_for_later_tokens_that_are_quantized_are_named(tmp_path):
    config = SimpleNamespace(quantization_config=FP8)
    empty = tiny_models.build("llama")
    empty._keys_to_ignore_on_load_unexpected = [r"model\.layers\.61.*"]
    later = {"model.layers.61.eh_proj.weight": torch.ones(2), "model.layers.61.eh_proj.weight_scale_inv": torch.ones(1)}
    save_file({"model.layers.6.up_proj.weight": torch.ones(2), **later}, tmp_path / "model.safetensors")
    (note,) = check_weights(tmp_path, empty, config, label="m")
    assert note.endswith(f": {', '.join(later)}") and "quantized" in note
    empty._keys_to_ignore_on_load_unexpected = None
    assert check_weights(tmp_path, empty, config, label="m") == []


@pytest.mark.parametrize("mark", ["weight.quant_state.bitsandbytes__nf4", "SCB"])
@pytest.mark.parametrize(("family", "layer"), [("mixtral", "block_sparse_moe.experts.0.w1"), ("qwen3", "mlp.up_proj")])
def test_experts_that_were_packed_one_by_one_are_refused(family, layer, mark, tmp_path):
    config = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    save_file({f"model.layers.0.{layer}.{mark}": torch.ones(1)}, tmp_path / "model.safetensors")
    empty = tiny_models.build(family)
    if family == "qwen3":
        assert check_weights(tmp_path, empty, config, label="m") == []
        return
    with pytest.raises(ConfigError, match="m: bitsandbytes has packed its experts .* --load_in_4bit True"):
        check_weights(tmp_path, empty, config, label="m")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"gptq. for gptqmodel, which cannot .* with --load_in_4bit True"),
        ({"quant_method": "awq", "bits": 4}, "awq. for gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "pip install compressed-tensors"),
        ({"quant_method": "vptq"}, r"quantized \(vptq\), which cannot be trained"),
        ({"bits": 4}, "an unknown method"),
    ],
)
def test_other_formats_are_one_error_before_anything_loads(facts, message):
    with pytest.raises(ConfigError, match=message):
        base_bits("m", SimpleNamespace(quantization_config=facts))


@pytest.mark.parametrize(
    ("facts", "how"),
    [
        (METHODS["gpt_oss"], "as mxfp4, and are dequantized while they load"),
        (FP8, "as fp8, and are dequantized while they load"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits"),
    ],
)
def test_bits_that_the_files_do_not_have_are_refused(facts, how):
    """They were taken, and did nothing."""
    with pytest.raises(ConfigError, match=f"--load_in_4bit True: the weights of m are stored {how}: leave it out"):
        base_bits("m", SimpleNamespace(quantization_config=facts), wanted=4)


def test_bits_that_are_wanted_are_those_of_plain_weights_or_of_the_files():
    plain, packed = SimpleNamespace(quantization_config={}), SimpleNamespace(quantization_config={"load_in_4bit": True})
    for each in (plain, packed):
        each.get_text_config = lambda each=each: each
    assert [base_bits("m", plain, wanted) for wanted in (None, 4)] == [None, 4]
    assert [base_bits("m", packed, wanted) for wanted in (None, 4)] == [4, 4]
