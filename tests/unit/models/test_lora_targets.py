"""What `all-linear` adapts in each family, which names it takes, and that plain peft loads the result."""

import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DbrxConfig,
    DbrxForCausalLM,
    DeepseekV32Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

from finetune.config.adapter_arguments import AdapterArguments
from finetune.models.adapters import attach_peft, check_attachable
from finetune.models.auto_class import empty_model
from finetune.models.loader import ModelInfo
from finetune.models.lora_targets import ALL_LINEAR, resolve_targets
from finetune.models.module_kinds import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDINGS,
    HEAD,
    LINEAR_ATTENTION,
    MTP,
    OTHERS,
    ROUTED_EXPERTS,
    ROUTER,
    SHARED_EXPERTS,
    VISION,
    module_kinds,
)
from finetune.models.zero3 import leaf_modules
from finetune.utils.errors import ConfigError
from tests.helpers import tiny_models
from tests.helpers.tiers import mostly_slow

FROZEN = {ROUTER, EMBEDDINGS, HEAD, OTHERS}
TRAINED = {
    "mixtral": {ATTENTION, ROUTED_EXPERTS},
    "gpt_oss": {ATTENTION, ROUTED_EXPERTS},
    "deepseek_v3": {ATTENTION, DENSE_MLP, ROUTED_EXPERTS, SHARED_EXPERTS},
    "jamba": {ATTENTION, LINEAR_ATTENTION, DENSE_MLP, ROUTED_EXPERTS},
    "qwen3_next": {ATTENTION, LINEAR_ATTENTION, ROUTED_EXPERTS, SHARED_EXPERTS},
    "llama4": {ATTENTION, ROUTED_EXPERTS, SHARED_EXPERTS},
    "mamba": {LINEAR_ATTENTION},
    "lfm2": {ATTENTION, LINEAR_ATTENTION, DENSE_MLP},
    "gemma4": {ATTENTION, DENSE_MLP, OTHERS},  # the projections of its embeddings for each layer; norms stay frozen
}
FAST = ["llama", "gpt2", "gemma3", "mixtral", "gpt_oss", "deepseek_v3", "jamba", "qwen3_next", "llama4", "mamba"]
IDS = torch.arange(3, 15)[None]


def adapt(model, *targets: str, **flags):
    adapter = AdapterArguments(use_lora=True, lora_target_modules=list(targets) or [ALL_LINEAR], **flags)
    return attach_peft(model, adapter)


def info_of(family: str) -> ModelInfo:
    with torch.device("meta"):
        empty = tiny_models.build(family)
    return ModelInfo(family, None, False, empty.config, "eager", empty, (), ())


@pytest.mark.parametrize("family", mostly_slow(tiny_models.FAMILIES, FAST))
def test_each_kind_is_trained_or_frozen_as_a_whole_and_plain_peft_loads_the_adapter(family, tmp_path):
    tiny_models.build(family).save_pretrained(tmp_path / "base")
    base = tiny_models.build(family)
    base.name_or_path = str(tmp_path / "base")
    kinds = module_kinds(base)
    names = {kinds.of(name) for name, _ in base.named_parameters()}
    model = adapt(base).eval()

    counts, trained = kinds.count(model), TRAINED.get(family, {ATTENTION, DENSE_MLP})

    assert {kind for kind, count in counts.items() if count.state == "trained"} == trained
    assert {kind for kind, count in counts.items() if count.state == "frozen"} == FROZEN & names - trained
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # an adapter that the code reads past has none
            assert parameter.grad is not None and parameter.grad.any(), name
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        wanted = model(input_ids=IDS, use_cache=False).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
        torch.testing.assert_close(loaded(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)


def test_the_loss_and_gradients_are_those_of_plain_peft_with_the_parameters_named():
    ours = adapt(tiny_models.build("mixtral"), lora_r=4)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    plain = get_peft_model(tiny_models.build("mixtral"), config)
    plain.load_state_dict(ours.state_dict())
    for model in (ours, plain):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (ours, plain)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_dropout_is_off_where_experts_are_wrapped_and_a_line_says_so():
    (note,) = check_attachable(info_of("mixtral"), AdapterArguments(use_lora=True))
    assert "--lora_dropout is 0, not 0.1" in note and "experts.gate_up_proj" in note
    assert adapt(tiny_models.build("mixtral")).peft_config["default"].lora_dropout == 0
    assert check_attachable(info_of("llama"), AdapterArguments(use_lora=True)) == []
    attention = AdapterArguments(use_lora=True, lora_target_modules=["q_proj"], lora_dropout=0.2)
    assert check_attachable(info_of("mixtral"), attention) == []


@pytest.mark.parametrize("flags", [{"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_wrapped_experts_cannot_do_is_an_error_before_the_weights_load(flags):
    with pytest.raises(ConfigError, match=f"--{next(iter(flags))} .*fused experts .*experts.down_proj"):
        check_attachable(info_of("gpt_oss"), AdapterArguments(use_lora=True, **flags))


@pytest.mark.parametrize(
    ("family", "targets", "modules", "parameters"),
    [
        ("mixtral", ["q_proj", "w1", "w2", "w3"], {"q_proj"}, {"experts.gate_up_proj", "experts.down_proj"}),
        ("mixtral", [r".*layers\.1\..*(q|down)_proj"], {"q_proj"}, {"experts.down_proj"}),
        ("qwen3_next", ["shared_expert.up_proj"], set(), {"shared_expert.up_proj.weight"}),
        ("jamba", ["experts.down_proj", "feed_forward.down_proj"], {"feed_forward.down_proj"}, {"experts.down_proj"}),
    ],
)
def test_names_mean_linear_layers_and_the_weights_of_experts(family, targets, modules, parameters):
    base = tiny_models.build(family)
    found = resolve_targets(base, targets[0] if "*" in targets[0] else targets)
    assert all(any(name.endswith(end) for end in modules) for name in found.modules) and bool(found.modules) == bool(
        modules
    )
    assert {".".join(name.split(".")[-len(next(iter(parameters)).split(".")) :]) for name in found.parameters} == (
        parameters
    )
    model = adapt(base, *targets)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == len(found.modules) + len(found.parameters)


def test_an_indexer_which_no_step_gives_a_gradient_has_no_adapter():
    sparse = dict(**tiny_models.LATENT, num_key_value_heads=4, index_topk=4, index_n_heads=2, index_head_dim=8)
    base = empty_model(DeepseekV32Config(**tiny_models.SIZES, **sparse))
    names = [name for name, _ in base.named_modules() if name.endswith("indexer.wk")]
    assert names and module_kinds(base).of(names[0]) == ROUTER
    assert not [name for name in resolve_targets(base, ["q_a_proj", "o_proj"]).modules if "indexer" in name]
    with pytest.raises(ConfigError, match="no layer wk"):
        resolve_targets(base, ["q_a_proj", "wk"])


def test_a_wrong_name_lists_the_right_ones_by_kind():
    right = r"k_proj, o_proj, q_proj, v_proj \(attention\).*experts.down_proj, experts.gate_up_proj \(routed experts\)"
    with pytest.raises(ConfigError, match=rf"no layer w_1 \(--lora_target_modules\).*{right}"):
        adapt(tiny_models.build("gpt_oss"), "q_proj", "w_1")


def test_a_layer_whose_weight_the_code_reads_past_an_adapter_is_refused():
    with pytest.raises(
        ConfigError, match=r"dt_proj of MambaForCausalLM: the code reads the weight .*: its layers are in_proj"
    ):
        adapt(tiny_models.build("mamba"), "dt_proj")


def test_a_layer_whose_adapter_peft_renames_when_it_loads_it_has_none():
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(CONFIG_MAPPING["inkling2_text"](num_hidden_layers=6))
    assert [name for name, _ in base.named_modules() if name.endswith("sconv.weight_proj")]
    chosen = resolve_targets(base, ALL_LINEAR).modules
    assert chosen and not [name for name in chosen if name.endswith("weight_proj")]
    with pytest.raises(ConfigError, match="weight_proj of Inkling2ForCausalLM: peft renames"):
        resolve_targets(base, ["weight_proj"])


def test_experts_whose_adapter_peft_renames_when_it_loads_it_have_none():
    base = empty_model(CONFIG_MAPPING["mistral_large4"](text_config={"num_hidden_layers": 2}))
    assert [name for name, _ in base.named_parameters() if name.endswith("experts.gate_up_proj")]
    chosen = resolve_targets(base, ALL_LINEAR)
    assert chosen.modules and not chosen.parameters
    with pytest.raises(ConfigError, match="gate_up_proj of .*: peft renames"):
        resolve_targets(base, ["gate_up_proj"])


def test_a_model_whose_adapter_peft_would_not_find_again_is_refused_with_the_reason():
    """Of DeepSeek-OCR 2 it renames all layers of the language model."""
    text = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}
    base = empty_model(CONFIG_MAPPING["deepseek_ocr2"](text_config=text))
    with pytest.raises(ConfigError, match="any layer of DeepseekOcr2.*peft renames .* train it in full"):
        adapt(base)


def test_the_head_of_the_language_model_inside_of_another_is_frozen():
    text = {**tiny_models.SIZES, **tiny_models.HYBRID["nemotron_h"][1]}
    base = empty_model(CONFIG_MAPPING["nemotron_h_omni"](text_config=text))
    assert base.get_output_embeddings() is None and module_kinds(base).of("language_model.lm_head") == HEAD
    assert not [name for name in resolve_targets(base, ALL_LINEAR).modules if name.endswith("lm_head")]


def test_experts_whose_weights_the_code_reads_past_a_wrapper_stay_frozen():
    config = DbrxConfig(
        vocab_size=tiny_models.VOCAB_SIZE, d_model=32, n_heads=4, n_layers=1, max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    base = DbrxForCausalLM(config)
    kinds, model = module_kinds(base), adapt(base)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert [kinds.count(model)[kind].state for kind in (ATTENTION, ROUTED_EXPERTS)] == ["trained", "frozen"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "jamba", "llama4"])
def test_zero_3_gathers_the_experts_and_wrapped_weights_of_a_layer_as_a_whole(family):
    empty = tiny_models.build(family)
    assert all(name.endswith("experts") for name in leaf_modules(empty, module_kinds(empty), empty))
    names = leaf_modules(adapt(tiny_models.build(family)), module_kinds(empty), empty)
    assert names and not [name for name in names if any(name.startswith(f"{other}.") for other in names)]


def test_experts_that_the_code_does_not_call_are_gathered_with_what_it_calls():
    empty = tiny_models.build("jetmoe")
    names = leaf_modules(empty, module_kinds(empty), empty)
    assert {name.partition(".0.")[2] for name in names if ".0." in name} == {
        "mlp.input_linear", "mlp.output_linear", "self_attention",
    }  # fmt: skip


@pytest.mark.slow
def test_in_every_family_of_transformers_what_is_resolved_is_what_peft_adapts():
    frozen, adapted = (ROUTER, EMBEDDINGS, HEAD, VISION, MTP), 0
    for model_type in {**CAUSAL, **IMAGES}:
        auto = AutoModelForImageTextToText if model_type in IMAGES else AutoModelForCausalLM
        try:
            config = CONFIG_MAPPING[model_type]()
            if not getattr(text := config.get_text_config(), "layer_types", None) and text.num_hidden_layers > 8:
                text.num_hidden_layers = 8
            with torch.device("meta"):
                base = auto.from_config(config)
        except Exception:  # many configs have no defaults that make a model
            continue
        if config.is_encoder_decoder or model_type in ("pi0", "unlimited_ocr"):  # no text; no name that peft keeps
            continue
        kinds, targets = module_kinds(base), resolve_targets(base, ALL_LINEAR)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = adapt(base)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert not [name for name in names if kinds.of(name) in frozen], model_type
        count = len(targets.modules) + len(targets.parameters)
        assert sum("lora_A" in name for name in names) == count > 0, model_type
        adapted += 1
    assert adapted > 200
