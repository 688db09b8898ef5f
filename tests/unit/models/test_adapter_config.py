"""Other methods of peft by `--adapter_config`, and weights that `--freeze` and `--train_only` select."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV32Config, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from finetune.config import AdapterArguments, parse
from finetune.config.arguments import ModelArguments
from finetune.models.adapters import attach_peft, check_attachable, check_saved_adapter, load_adapter
from finetune.models.auto_class import empty_model
from finetune.models.freezing import freeze
from finetune.models.loader import ModelInfo, freeze_untrained, inspect_model
from finetune.models.module_kinds import ATTENTION, EMBEDDINGS, HEAD, ROUTER, VISION, module_kinds
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models, vision_models

REQUIRED = ["--model_name_or_path", "M", "--data_path", "d.json", "--output_dir", "out"]
IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS = {
    "IA3": IA3,
    "LoHa": {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": "all-linear"},
    "norms": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]},
    "LoRA with ranks": {
        "peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 4},
    },
    "a saved adapter": {
        "peft_type": "OFT", "oft_block_size": 8, "target_modules": ["q_proj"], "inference_mode": True,
        "base_model_name_or_path": "elsewhere",
    },
    "P-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "some tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 6]},
}  # fmt: skip


def config(**options) -> AdapterArguments:
    return AdapterArguments(adapter_config=json.dumps(options))


def on_meta(family: str) -> ModelInfo:
    with torch.device("meta"):
        base = tiny_models.build(family)
    return ModelInfo(family, None, False, base.config, "eager", base, (), ())


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_names_of_layers_mean_those_outside_of_a_vision_tower(family, tmp_path):
    info = inspect_model(ModelArguments(str(vision_models.save(family, tmp_path / family))), "eager")
    assert check_attachable(info, config(**IA3)) == []
    with torch.device("meta"):
        counts = info.kinds.count(attach_peft(info.empty, config(**IA3)))
    assert counts[VISION].trained == 0 < counts[ATTENTION].trained


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft measures norms for LN_TUNING
@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_peft_trains_and_is_saved(name, tmp_path):
    arguments, base = config(**METHODS[name]), tiny_models.build("llama")
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    assert check_attachable(on_meta("llama"), arguments) == []

    model = attach_peft(base, arguments).train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids, labels=ids).loss
    before.backward()
    optimizer.step()
    after = model(input_ids=ids, labels=ids).loss
    model.save_pretrained(tmp_path)
    check_saved_adapter(tmp_path)

    assert after < before
    kept = {key.replace("base_model.model.", "").replace(".base_layer", ""): value
            for key, value in model.state_dict().items()}  # fmt: skip
    moved = [key for key, value in frozen.items() if key in kept and not torch.equal(kept[key], value)]
    assert moved == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LORAX"}, "has no method LORAX: expected one of .*IA3"),
        ({**IA3, "rank": 4}, "peft's IA3 has no option rank"),
        ({**IA3, "feedforward_modules": ["up_proj"]}, "peft's IA3 cannot be attached: .*its layers are"),
        ({"peft_type": "LOHA", "target_modules": ["q_proj", "embed_tokens"]}, "LOHA cannot be attached: .* supported"),
        ({"peft_type": "LORA", "target_modules": ["w_q"]}, "the model has no layer w_q"),
        ({**IA3, "modules_to_save": ["head"]}, "no layer head"),
        ({"peft_type": "LORA", "trainable_token_indices": [5, 200]}, r" \[200\]: .* has 200 rows.* --new_tokens"),
        (
            {"peft_type": "LORA", "trainable_token_indices": {"lm_head": [-1]}},
            r" \[-1\]: expected ids from 0 to 199: lm",
        ),
        (
            {"peft_type": "LORA", "trainable_token_indices": {"q_proj": [1]}},
            "of q_proj: expected embed_tokens or lm_head",
        ),
        ({"peft_type": "LORA", "trainable_token_indices": 7}, r"trainable_token_indices \[7\]: expected ids"),
        ({"peft_type": "TRAINABLE_TOKENS"}, r" token_indices \[None\]: expected ids from 0 to 199"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 1000]}, r"\[1000\]: .* --new_tokens"),
    ],
)
def test_what_peft_does_not_know_is_an_error_before_the_model_loads(options, message):
    with pytest.raises(ConfigError, match=message):
        check_attachable(on_meta("llama"), config(**options))


@pytest.mark.parametrize(("method", "message"), [("OSF", "fits no layer"), ("LILY", "does not support .*Conv1D")])
def test_a_method_that_fits_no_layer_is_an_error(method, message):
    with pytest.raises(ConfigError, match=f"peft's {method} cannot be attached: .*{message}"):
        check_attachable(on_meta("gpt2"), config(peft_type=method, target_modules="all-linear"))


def test_a_method_that_computes_from_weights_is_checked_once_they_are_loaded():
    adamss = config(peft_type="ADAMSS", target_modules=["q_proj"])
    assert ["checked only once" in note for note in check_attachable(on_meta("llama"), adamss)] == [True]
    assert attach_peft(tiny_models.build("llama"), adamss)


def test_the_flag_keeps_what_the_file_holds(tmp_path):
    file = tmp_path / "ia3.json"
    file.write_text(json.dumps(IA3))

    kept = parse([*REQUIRED, "--adapter_config", str(file)]).adapter

    assert json.loads(kept.adapter_config) == IA3 and kept.kind() == "ia3"
    assert parse([*REQUIRED, "--adapter_config", kept.adapter_config]).adapter == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter_config", "none.json"], "none.json: there is no such file"),
        (["--adapter_config", '{"r": 4}'], 'expected a JSON object with a method, such as "peft_type"'),
        (["--adapter_config", '{"r": }'], "not JSON"),
        (["--adapter_config", '{"peft_type": "LORA", "modules_to_save": 3}'], "modules_to_save 3: expected a list"),
        (["--adapter_config", '{"peft_type": "ADALORA"}'], "AdaLoRA moves its ranks"),
        (["--adapter_config", '{"peft_type": "IA3"}', "--use_lora"], "exclude each other: the file says what is"),
        (["--adapter_config", '{"peft_type": "LORA"}', "--lora_r", "4"], "--adapter_config and --lora_r exclude"),
        (["--adapter_config", '{"peft_type": "IA3"}', "--loraplus_lr_ratio", "4"], "a ia3 adapter would be trained"),
        (["--adapter_config", '{"peft_type": "LORA", "init_lora_weights": "eva"}'], "--init_lora_weights eva"),
        (["--adapter_config", '{"peft_type": "LORA", "bias": "all"}'], "bias all: biases are not trained: leave"),
        (["--adapter_config", '{"peft_type": "LORA", "kasa_config": {}}'], "kasa_config {}: it changes the base"),
        (["--use_lora", "--freeze", "embed_tokens"], "--freeze: a lora adapter is trained"),
        (["--freeze", "a", "--train_only", "b"], "--freeze and --train_only exclude each other"),
        (["--loraplus_lr_ratio", "4"], "all parameters would be trained: add --use_lora True"),
        (["--embedding_learning_rate", "0"], "expected more than 0"),
    ],
)
def test_flags_that_exclude_each_other(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse([*REQUIRED, *flags])


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({"freeze": ["embed_tokens", "layers.0"]}, ["lm_head", "layers.1", "norm"]),
        ({"freeze": ["layers.0-"]}, ["embed_tokens", "lm_head", "norm"]),
        ({"train_only": ["layers.1-7.mlp", HEAD]}, ["layers.1.mlp", "lm_head"]),
        ({"train_only": [r".*\.(q|v)_proj\..*"]}, ["self_attn.q_proj", "self_attn.v_proj"]),
    ],
)
def test_freezing_selects_by_names_ranges_kinds_and_expressions(flags, trained):
    base = tiny_models.build("llama")

    freeze(base, module_kinds(base), flags.get("freeze", ()), flags.get("train_only", ()))

    left = {name for name, weight in base.named_parameters() if weight.requires_grad}
    expected = {name for name, _ in base.named_parameters() if any(f".{part}." in f".{name}" for part in trained)}
    assert left == expected and 0 < len(left) < len(list(base.parameters()))


def test_tied_weights_are_one():
    for flags in (((), ["embed_tokens"]), ((), ["lm_head"])):
        base = tiny_models.build("gemma")
        assert base.config.tie_word_embeddings
        freeze(base, module_kinds(base), *flags)
        assert [name for name, weight in base.named_parameters() if weight.requires_grad] == [
            "model.embed_tokens.weight"
        ]


def test_the_router_of_a_mixture_of_experts_is_a_kind():
    base = tiny_models.build("mixtral")
    kinds = module_kinds(base)
    freeze(base, kinds, [ROUTER], ())
    states = {kind: count.state for kind, count in kinds.count(base).items()}
    assert states[ROUTER] == "frozen" and states[EMBEDDINGS] == "trained"


def test_what_the_code_keeps_from_training_is_frozen_once_it_is_loaded(tmp_path):
    experts = dict(**tiny_models.GROUPED, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1)
    config = Ernie4_5_MoeConfig(**tiny_models.SIZES, **experts)
    Ernie4_5_MoeForCausalLM(config).save_pretrained(tmp_path)
    bias = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"
    info = inspect_model(ModelArguments(str(tmp_path)), "sdpa")
    model = Ernie4_5_MoeForCausalLM.from_pretrained(tmp_path)
    assert model.get_parameter(bias).requires_grad  # else transformers remembers it by itself

    freeze_untrained(model, info.kinds)

    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == [bias]


def test_indexers_of_sparse_attention_are_frozen():
    latent = dict(**tiny_models.LATENT, num_key_value_heads=4, index_topk=4, index_n_heads=2, index_head_dim=8)
    model = empty_model(DeepseekV32Config(**tiny_models.SIZES, **latent))
    freeze_untrained(model, module_kinds(model))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    indexers = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert len(indexers) == 2 * 5 and trained == dict(model.named_parameters()).keys() - indexers


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze": ["embeddings_table"]}, "no weight has this name or kind: .*embed_tokens.*; kinds are attention"),
        ({"freeze": ["model", "lm_head"]}, "no weight is left to train"),
        ({"train_only": ["(q"]}, "no regular expression"),
        ({"embedding_learning_rate": 1e-4, "freeze": ["embed_tokens", "lm_head"]}, "neither embeddings nor head"),
        ({"embedding_learning_rate": 1e-4, "use_lora": True}, "give --modules_to_save embed_tokens lm_head"),
    ],
)
def test_what_selects_nothing_is_an_error_before_the_model_loads(flags, message):
    with pytest.raises(ConfigError, match=message):
        check_attachable(on_meta("llama"), AdapterArguments(**flags))


def test_a_saved_adapter_of_any_method_can_be_trained_further(tmp_path):
    first = attach_peft(tiny_models.build("llama"), config(**IA3))
    with torch.no_grad():
        for weight in first.parameters():
            weight.mul_(1.1 if weight.requires_grad else 1)
    first.save_pretrained(tmp_path)

    flags = parse(["--adapter_name_or_path", str(tmp_path), *REQUIRED])
    assert flags.adapter.kind() == "ia3"
    second = load_adapter(tiny_models.build("llama"), Path(flags.model.adapter_name_or_path), base_revision=None)

    ids = torch.arange(5, 15)[None]
    assert torch.equal(second.eval()(input_ids=ids).logits, first.eval()(input_ids=ids).logits)
    assert any(weight.requires_grad for weight in second.parameters())
