"""A GGUF file read again is the same model with the same tokenizer. The reader is transformers', the writer ours."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.export.gguf_writer import ARCHITECTURES, _rope_factors, check_gguf, write_gguf
from finetune.utils.errors import ConfigError
from tests.helpers import made_results as made
from tests.helpers import tiny_models
from tests.helpers.made_results import logits
from tests.helpers.tiers import mostly_slow

TEXTS = (
    "Hello, world 12345",
    "杭州是浙江省 的省会。\n\n def f(x):\n\treturn 2**10",
    "<|im_start|>user\nhi",
    "  two  spaces 🏙️",
)
# The reader takes Mistral for Llama, which has no window, and Qwen3's heads to be 128 wide.
AS_READ = {"mistral": dict(sliding_window=None), "qwen3": dict(head_dim=128)}


def saved(folder: Path, tokenizer, family: str = "llama", **changed) -> Path:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "head_dim": 16, **changed}
    model = tiny_models.build(family, vocab_size=len(tokenizer), **sizes).eval()
    return made.save_base(model, folder, tokenizer)


def read_again(path: Path, alone: Path):
    """Model and tokenizer out of the file, which lies in a folder alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    alone.mkdir()
    shutil.copy(path, alone / path.name)
    options = {"gguf_file": path.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(alone, quantization_config=GgufConfig(dequantize=True), **options)
    return model, AutoTokenizer.from_pretrained(alone, gguf_file=path.name)


@pytest.fixture(scope="module")
def few_tokens(smol_tokenizer):
    """The tokenizer of the small model with few tokens: to read 49,152 of them from a file takes many seconds."""
    texts = ["".join(letter for letter in text if not letter.isdigit()) for text in TEXTS]  # as its own: one a token
    return smol_tokenizer.train_new_from_iterator(texts, 400)


@pytest.mark.parametrize("family", mostly_slow(ARCHITECTURES, ["llama", "qwen3"]))
def test_the_file_read_again_is_the_same_model(family, tmp_path, few_tokens):
    if family == "qwen2":
        tiny_models.FAMILIES.setdefault("qwen2", ("Qwen2", tiny_models.GROUPED))
    folder = saved(tmp_path / "merged", few_tokens, family, **AS_READ.get(family, {}))
    check_gguf(folder, few_tokens)

    path = write_gguf(folder, "f32", stop_token_id=2)

    assert path == folder / "merged-f32.gguf"
    model, tokenizer = read_again(path, tmp_path / "alone")
    from transformers import AutoModelForCausalLM

    ids = tuple(few_tokens(TEXTS[1])["input_ids"])
    assert torch.equal(
        logits(model, ids), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    )
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [few_tokens(text)["input_ids"] for text in TEXTS]
    assert tokenizer.eos_token_id == 2 and tokenizer.chat_template == few_tokens.chat_template


@pytest.mark.parametrize(
    ("kind", "apart"), mostly_slow([("f16", 2e-3), ("q8_0", 5e-2), ("q4_0", 0.6)], [("q4_0", 0.6)])
)
def test_coarser_numbers_are_near_and_smaller(kind, apart, tmp_path, few_tokens):
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "merged", few_tokens)
    model, _ = read_again(write_gguf(folder, kind, stop_token_id=2), tmp_path / "alone")
    ids = tuple(few_tokens(TEXTS[1])["input_ids"])
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    distance = (logits(model, ids) - wanted).norm() / wanted.norm()
    assert 0 < distance < apart
    assert (folder / f"merged-{kind}.gguf").stat().st_size < 0.8 * (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_sentencepiece_tokenizer_gets_scores_in_the_order_of_its_merges(tmp_path, real_tokenizers):
    tokenizer = real_tokenizers["mistral"]
    folder = saved(tmp_path / "merged", tokenizer, "mistral")
    _, again = read_again(write_gguf(folder, "f16", stop_token_id=2), tmp_path / "alone")
    for text in TEXTS:
        assert (
            again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


@pytest.mark.slow
def test_a_whole_vocabulary_is_read_again(tmp_path, smol_tokenizer):
    _, again = read_again(
        write_gguf(saved(tmp_path / "merged", smol_tokenizer), "f16", stop_token_id=2), tmp_path / "a"
    )
    assert [again(text)["input_ids"] for text in TEXTS] == [smol_tokenizer(text)["input_ids"] for text in TEXTS]


def test_what_cannot_be_written_is_told_before_anything_is_merged(tmp_path, smol_tokenizer, real_tokenizers):
    folder = saved(tmp_path / "gemma", smol_tokenizer, "gemma")
    with pytest.raises(ConfigError, match="--gguf: gemma is not supported, only llama, mistral, qwen2, qwen3: "):
        check_gguf(folder, smol_tokenizer)
    llama = saved(tmp_path / "llama", smol_tokenizer)
    with pytest.raises(
        ConfigError, match=r"pre-tokenizer of this model \(Split, .*\) is not supported: merge without --gguf"
    ):
        check_gguf(llama, real_tokenizers["deepseek"])


def test_the_factors_of_llama_3_are_what_transformers_divides_by():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    assert np.allclose(plain / _rope_factors(config.to_dict()), scaled.numpy(), rtol=1e-5)
    assert len(set(_rope_factors(config.to_dict()).round(3))) > 3, "short, long and mixed waves"


def test_rope_scaling_under_its_older_key_is_written_or_refused(tmp_path, few_tokens):
    """As the cards of Qwen2.5 tell users to write it; transformers reads it, and a merge keeps the base's config."""
    from gguf import GGUFReader

    folder = saved(tmp_path / "merged", few_tokens)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    for kind in ("yarn", "dynamic"):
        config["rope_scaling"] = {"type": kind, "factor": 4.0}
        (folder / "config.json").write_text(json.dumps(config))
        if kind == "yarn":
            fields = GGUFReader(write_gguf(folder, "f16", stop_token_id=2)).fields
            scaling = [fields[f"llama.rope.scaling.{name}"].contents() for name in ("type", "factor")]
            assert scaling == ["yarn", 4.0]
    with pytest.raises(ConfigError, match="rope_type dynamic is not supported"):
        check_gguf(folder, few_tokens)
