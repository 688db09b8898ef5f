"""Which layers LoRA is attached to, as `--lora_target_modules` says it; and saved adapters that are continued."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file

from finetune.config.adapter_arguments import AdapterArguments
from finetune.models.adapters import InitialLora, attach_adapter, attach_peft, check_attachable, load_adapter
from finetune.models.loader import ModelInfo
from finetune.utils.errors import ConfigError
from tests.helpers import made_results as made
from tests.helpers import tiny_models
from tests.helpers.lora import attach_lora


def adapted(*targets: str, family: str = "llama", **flags) -> list[str]:
    """Return the layers with LoRA, by their full names."""
    with torch.device("meta"):
        base = tiny_models.build(family)
        adapter = AdapterArguments(use_lora=True, lora_target_modules=list(targets), **flags)
        info = ModelInfo(family, None, False, base.config, "eager", base, (), ())
        model = attach_adapter(base, adapter, info, None)
    names = (name for name, _ in model.named_parameters() if "lora_A" in name)
    return sorted(re.sub(r"^base_model\.model\.|\.lora_A.*", "", name) for name in names)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj\uff0cv_proj"], ["q_proj v_proj"]]
)
def test_names_may_be_separated_by_commas(targets):
    attention = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    assert adapted(*targets) == attention


def test_one_word_with_the_signs_of_a_regular_expression_is_one_over_full_names():
    names = [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert adapted(r".*layers\.1\.mlp\..*_proj") == names
    assert adapted(r".*\.1\.(mlp|nothing)\.[a-z]{2,5}_proj") == names
    assert len(adapted("all-linear")) == 14


@pytest.mark.parametrize("targets", [["qkv_proj"], ["q_proj", "qkv_proj"], ["q_proj,qkv_proj"], [r".*qkv.*"], ["(q"]])
def test_a_name_of_no_layer_is_an_error_that_lists_the_linear_layers(targets):
    with pytest.raises(
        ConfigError,
        match="k_proj, o_proj, q_proj, v_proj .attention.; down_proj, gate_proj, up_proj .dense MLP.; lm_head",
    ):
        adapted(*targets)
    with pytest.raises(ConfigError, match="c_attn, c_proj .attention.; c_fc, c_proj .dense MLP.; lm_head"):
        adapted(*targets, family="gpt2")


def test_a_layer_to_save_that_is_none_is_an_error():
    with pytest.raises(ConfigError, match="the model has no layer head"):
        adapted("q_proj", modules_to_save=["lm_head", "head"])


KINDS = {
    "plain": dict(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}),
    "dora": dict(r=4, target_modules="all-linear", use_dora=True, use_rslora=True, modules_to_save=["lm_head"]),
    "experts": dict(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
}


def config_of(kind: str) -> peft.PeftConfig:
    classes = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    if kind in classes:
        return classes[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **KINDS[kind])


@pytest.mark.parametrize("kind", [*KINDS, "prefix", "prompt"])
def test_a_continued_adapter_starts_where_it_was_saved(kind, tmp_path):
    family = "mixtral" if kind == "experts" else "llama"
    saved = made.with_random_weights(peft.get_peft_model(tiny_models.build(family), config_of(kind)))
    saved.save_pretrained(tmp_path / "saved")
    continued = load_adapter(tiny_models.build(family), tmp_path / "saved", base_revision=None)
    assert continued.peft_config["default"].r == 4 if kind in KINDS else continued.active_peft_config.is_prompt_learning
    trainable = [name for name, parameter in saved.train().named_parameters() if parameter.requires_grad]
    assert trainable == [name for name, parameter in continued.named_parameters() if parameter.requires_grad]
    assert torch.equal(made.logits(continued), made.logits(saved))
    continued.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_an_adapter_of_another_base_is_an_error(tmp_path):
    made.with_random_weights(peft.get_peft_model(tiny_models.build("llama"), config_of("plain"))).save_pretrained(
        tmp_path
    )
    for family in ("gpt2", "qwen3"):
        with pytest.raises(ConfigError, match=re.escape(f"the adapter {tmp_path}")):
            load_adapter(tiny_models.build(family), tmp_path, base_revision=None)


@pytest.mark.parametrize(
    "flags", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=["lora", "head", "dora"]
)
def test_under_autocast_the_base_keeps_its_precision_and_what_is_trained_is_float32(flags):
    base = tiny_models.build("llama").bfloat16()
    adapter = AdapterArguments(use_lora=True, lora_target_modules=["all-linear"], **flags)
    info = ModelInfo("llama", None, False, base.config, "eager", base, (), ())
    model = attach_adapter(base, adapter, info, None, precision="float32")
    types = {weight.requires_grad: set() for weight in model.parameters()}
    for weight in model.parameters():
        types[weight.requires_grad].add(weight.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}

    with torch.autocast("cpu", torch.bfloat16):
        ids = torch.arange(3, 15)[None]
        model(input_ids=ids, labels=ids).loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(("family", "names"), [("llama", {"embed_tokens", "lm_head"}),
                                               ("gemma4", {"embed_tokens", "embed_tokens_per_layer"})])  # fmt: skip
def test_new_tokens_train_every_module_with_a_row_per_token(family, names, tmp_path):
    """Else rows would be drawn at random again where the adapter is loaded."""
    base = tiny_models.build(family)
    before = {name: weight.shape for name, weight in base.named_parameters()}
    base.resize_token_embeddings(tiny_models.VOCAB_SIZE + 2, mean_resizing=False)
    grown = {name for name, weight in base.named_parameters() if weight.shape != before[name]}
    model = attach_lora(base, r=2, alpha=2, dropout=0, target_modules=["q_proj"], train_embeddings=True)
    model.save_pretrained(tmp_path)
    saved = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert grown <= saved  # peft adds a tied head
    assert {name.split(".")[-2] for name in grown} == names


@pytest.mark.parametrize(
    ("family", "name", "layers"), [("llama", "norm", {"model.norm"}), ("qwen3_next", "gate", {"mlp.gate"})]
)
def test_a_layer_to_save_is_one_of_this_name_and_none_whose_name_ends_with_it(family, name, layers):
    """peft compares the ends of names as texts: `norm` would be `input_layernorm`, too, and `gate` shared experts'."""
    base = tiny_models.build(family)
    model = attach_lora(base, r=2, alpha=2, dropout=0, target_modules=["q_proj"], modules_to_save=[name])
    names = [each for each, weight in model.named_parameters() if weight.requires_grad and "modules_to_save" in each]
    assert {".".join(each.partition(".modules_to_save")[0].split(".")[-2:]) for each in names} == layers


def test_layers_inside_one_that_is_trained_in_full_have_no_lora(tmp_path):
    """peft does so with layers, not with fused experts, and could not load what it saves."""
    base = tiny_models.build("mixtral")
    model = attach_lora(base, r=2, alpha=2, dropout=0, target_modules=["all-linear"], modules_to_save=["mlp"])
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert {("lora" in name, "mlp" in name) for name in names} == {(True, False), (False, True)}
    wanted = made.logits(made.with_random_weights(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(made.logits(peft.PeftModel.from_pretrained(tiny_models.build("mixtral"), tmp_path)), wanted)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
@pytest.mark.parametrize("method", ["LORA", "IA3"])
@pytest.mark.parametrize(("family", "names"), [("gpt2", ["wte"]), ("llama", ["embed_tokens"]), ("llama", ["lm_head"])])
def test_both_sides_of_tied_embeddings_are_trained(family, names, method, tmp_path):
    """peft ties the copies of LoRA alone, and only those of some names."""

    def build():
        return tiny_models.build(family, tie_word_embeddings=True)

    target = "c_attn" if family == "gpt2" else "k_proj"
    options = {"peft_type": method, "target_modules": [target], "modules_to_save": names}
    options |= {"fan_in_fan_out": family == "gpt2"} | ({"feedforward_modules": []} if method == "IA3" else {})
    model = attach_peft(build(), AdapterArguments(adapter_config=json.dumps(options)))
    base = model.get_base_model()
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        assert module.modules_to_save["default"].weight.requires_grad
    wanted = made.logits(made.with_random_weights(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(made.logits(peft.PeftModel.from_pretrained(build(), tmp_path)), wanted)


def test_a_module_with_layers_in_4_bits_cannot_be_trained_in_full():
    with torch.device("meta"):
        base = tiny_models.build("llama")
    info = ModelInfo("llama", None, False, base.config, "eager", base, (), (), bits=4)
    for name in ("mlp", "self_attn.q_proj"):
        with pytest.raises(ConfigError, match=f"--modules_to_save {name}: --load_in_4bit quantizes these layers"):
            check_attachable(info, AdapterArguments(use_lora=True, modules_to_save=[name]))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_moves_the_head_would_move_tied_embeddings(family, start):
    flags = {"use_lora": True, "lora_dropout": 0.0, "lora_target_modules": ["lm_head"], "init_lora_weights": start}
    attach_peft(tiny_models.build(family, tie_word_embeddings=False), AdapterArguments(**flags))
    with pytest.raises(ConfigError, match=f"--init_lora_weights {start}: .* lm_head, which is that of the embeddings"):
        attach_peft(tiny_models.build(family, tie_word_embeddings=True), AdapterArguments(**flags))


def test_a_start_from_transposed_weights_is_an_error():
    flags = {"use_lora": True, "lora_dropout": 0.0, "init_lora_weights": "olora"}
    with pytest.raises(ConfigError, match="GPT2LMHeadModel stores transposed weights"):
        attach_peft(tiny_models.build("gpt2"), AdapterArguments(**flags))


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning")
@pytest.mark.parametrize(
    ("start", "rank", "targets"),
    [
        ("pissa", 4, ["q_proj", "embed_tokens"]),
        ("pissa", 20, ["q_proj", "k_proj"]),
        ("olora", 20, ["q_proj", "k_proj"]),
    ],
)
def test_moved_weights_are_saved_as_plain_lora_of_embeddings_and_of_layers_smaller_than_the_rank(
    start, rank, targets, tmp_path
):
    flags = {"init_lora_weights": start, "target_modules": targets}
    model = attach_lora(tiny_models.build("llama"), r=rank, alpha=8, dropout=0, **flags)
    initial = InitialLora(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight += 0.05 * torch.randn_like(weight)
    wanted = made.logits(model)
    model.save_pretrained(tmp_path)
    initial.rewrite(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path)
    torch.testing.assert_close(made.logits(loaded), wanted, atol=1e-4, rtol=1e-4)
