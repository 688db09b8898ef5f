"""Vocabulary and positions of a model against tokenizer and data."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from finetune.config.adapter_arguments import AdapterArguments
from finetune.models.adapters import attach_peft, check_attachable
from finetune.models.loader import ModelInfo
from finetune.training.model_checks import check_positions, check_reads_text, check_vocabulary
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models

FULL, LORA = AdapterArguments(), AdapterArguments(use_lora=True)


def info(family: str = "llama", **changed: Any) -> ModelInfo:
    with torch.device("meta"):
        empty = tiny_models.build(family, **changed)
    return ModelInfo(family, None, False, empty.config, "eager", empty, (), ())


class Tokenizer(list):
    """The names of tokens, with methods of a tokenizer; hashed by identity, as one is."""

    __hash__ = object.__hash__


class TestVocabulary:
    @staticmethod
    def check(model: ModelInfo, adapter: AdapterArguments, *, size: int = 210, adds_tokens: bool = False) -> list[str]:
        names = [f"<{number}>" for number in range(size)]
        tokenizer = Tokenizer(names)
        tokenizer.get_vocab = lambda: {name: number for number, name in enumerate(names)}
        tokenizer.convert_ids_to_tokens = lambda ids: [names[number] for number in ids]
        return check_vocabulary(model, tokenizer, adapter, adds_tokens=adds_tokens)

    def test_a_tokenizer_that_fits_is_no_matter(self):
        assert self.check(info(), LORA, size=200) == []

    @pytest.mark.parametrize(("tied", "names"), [(False, "embed_tokens lm_head"), (True, "embed_tokens")])
    def test_lora_trains_whole_embeddings_only_where_the_user_asks_for_it(self, tied, names):
        model = info(tie_word_embeddings=tied)
        with pytest.raises(ConfigError) as raised:
            self.check(model, LORA)
        message = str(raised.value)
        assert "210 tokens" in message and "for 200: none for <200>, <201>," in message and "and 2 more" not in message
        assert f"--modules_to_save {names}, or" in message and f"{210 * 32 * len(names.split()):,} of" in message
        asked = AdapterArguments(use_lora=True, modules_to_save=names.split())
        for notes in (self.check(model, asked), self.check(model, LORA, adds_tokens=True)):
            assert len(notes) == 1 and "are trained in full" in notes[0]

    def test_half_of_them_is_not_all(self):
        with pytest.raises(ConfigError, match="--modules_to_save embed_tokens lm_head"):
            self.check(info(), AdapterArguments(use_lora=True, modules_to_save=["lm_head"]))

    @pytest.mark.parametrize(("saved", "told"), [([], "holds no emb"), (["embed_tokens", "lm_head"], "holds 205")])
    def test_an_adapter_that_is_continued_takes_no_new_tokens(self, saved, told, tmp_path):
        flags = AdapterArguments(use_lora=True, modules_to_save=saved)
        attach_peft(tiny_models.build("llama", vocab_size=205), flags).save_pretrained(tmp_path)
        model = replace(info(), adapter=str(tmp_path))
        with pytest.raises(ConfigError, match=f"{told}.*merge it"):
            self.check(model, flags, adds_tokens=True)
        if saved:
            assert "are trained in full" in self.check(model, flags, size=205)[0]

    def test_full_training_says_that_they_grow(self):
        assert "all rows are trained" in " ".join(self.check(info(), FULL))

    @pytest.mark.parametrize(("flags", "name"), [({"freeze": ["embed_tokens"]}, "embed_tokens"),
                                                 ({"train_only": ["attention"]}, "lm_head")])  # fmt: skip
    def test_frozen_embeddings_cannot_grow(self, flags, name):
        with pytest.raises(ConfigError, match=f"--freeze or --train_only keeps .*{name}.weight from training"):
            self.check(info(), AdapterArguments(**flags), adds_tokens=True)
        assert self.check(info(), AdapterArguments(freeze=["layers.0"]), adds_tokens=True)

    def test_virtual_tokens_cannot_train_them(self):
        with pytest.raises(ConfigError, match="--adapter prefix cannot train embeddings"):
            self.check(info(), AdapterArguments(adapter="prefix"))


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("idefics", "text alone: .*pixel_values"),
        ("voxtral_realtime", "text alone: .*input_features"),
        ("kyutai_speech_to_text", "text alone: .*broadcast"),
        ("pp_formulanet", "no embeddings of text"),
        ("smolvlm", None),
    ],
)
def test_a_model_that_does_not_run_without_images_or_sound_is_refused(family, told):
    config = CONFIG_MAPPING[family]()
    config.get_text_config().num_hidden_layers = 1
    with torch.device("meta"):
        empty = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)](config)
    with nullcontext() if told is None else pytest.raises(ConfigError, match=f"{type(empty).__name__} .*{told}"):
        check_reads_text(ModelInfo(family, None, False, config, "eager", empty, (), ()))


def test_a_model_that_does_not_generate_token_by_token_is_refused():
    described = replace(info(), empty=info().empty.model)  # a class without generation, as that of DiffusionGemma
    with pytest.raises(ConfigError, match="LlamaModel does not generate token by token .*: give a causal"):
        check_reads_text(described)
    with pytest.raises(ConfigError, match="LoRA cannot be attached: LlamaModel has no prepare_inputs.*--use_lora F"):
        check_attachable(described, LORA)


class TestPositions:
    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_learned_positions_are_a_limit(self, family):
        assert check_positions(info(family), 64, FULL) == []
        with pytest.raises(ConfigError, match="has 65 tokens, .* has 64 position embeddings: give --model_max_l.* 64"):
            check_positions(info(family), 65, FULL)
        with pytest.raises(ConfigError, match="60 tokens and 5 virtual ones.*--model_max_length 59"):
            check_positions(info(family), 60, AdapterArguments(adapter="prompt", num_virtual_tokens=5))

    @pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3", "phi3"])
    def test_rotary_positions_are_a_note_with_the_numbers(self, family):
        assert check_positions(info(family), 64, FULL) == []
        (note,) = check_positions(info(family), 65, LORA)
        assert "65 tokens" in note and "64 positions" in note and "--model_max_length 64" in note

    @pytest.mark.parametrize(
        ("rule", "positions"),
        [
            (dict(rope_type="linear", factor=4.0), 256),
            (dict(rope_type="dynamic", factor=2.0), 128),
            (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
            (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=32), 64),
            (
                dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=8, low_freq_factor=1.0,
                     high_freq_factor=4.0), 64,
            ),
        ],
    )  # fmt: skip
    def test_rope_scaling_counts(self, rule, positions):
        model = info(rope_parameters={"rope_theta": 1e4, **rule})
        assert check_positions(model, positions, FULL) == []
        assert f"{positions:,} positions" in " ".join(check_positions(model, positions + 1, FULL))

    @pytest.mark.parametrize("family", ["bloom", "mamba"])
    def test_a_model_without_such_positions_has_no_limit(self, family):
        assert check_positions(info(family), 10**6, FULL) == []
