"""Families that no other test names: batches give what conversations give one by one, LoRA trains the right kinds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finetune.models.attention import supports_logits_to_keep
from finetune.models.loader import freeze_untrained
from finetune.models.module_kinds import (
    ATTENTION,
    DENSE_MLP,
    LINEAR_ATTENTION,
    ROUTED_EXPERTS,
    ROUTER,
    SHARED_EXPERTS,
    module_kinds,
)
from finetune.models.padding_free import enable_padding_free
from tests.helpers import tiny_models
from tests.helpers.equality import CONVERSATIONS, FORMS, QUIET_PEFT, one_by_one, trained
from tests.helpers.lora import attach_lora
from tests.helpers.tiers import mostly_slow

pytestmark = [*QUIET_PEFT, pytest.mark.filterwarnings("ignore::FutureWarning")]
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Fields that configs may have; each family takes those that it knows.
FIELDS: dict[str, Any] = {
    **tiny_models.SIZES, **tiny_models.GROUPED, **dict.fromkeys(EXPERTS, 4), "head_dim": 8,
    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1, "moe_layer_end_index": 1, "sliding_window": tiny_models.WINDOW, "ffn_dim": 48,
    "d_model": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_layers": 2, "n_heads": 4, "num_layers": 2,
    "attention_heads": 4, "n_positions": 64, "max_seq_len": 64, "rotary_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "layerdrop": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
}  # fmt: skip
DENSE, ROUTED = {ATTENTION, DENSE_MLP}, {ATTENTION, ROUTED_EXPERTS}
SHARED = {*ROUTED, SHARED_EXPERTS}
LATENT = {"num_key_value_heads": 4}
# Fewer tokens than a conversation has, and few heads: scores are often zero, and which of these is chosen depends on
# the length of the row.
INDEXED = {**LATENT, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8}
# family -> what LoRA trains, and fields of its own
FAMILIES: dict[str, tuple[set[str], dict[str, Any]]] = {
    **dict.fromkeys(
        "apertus arcee biogpt bitnet codegen cohere2 cwm diffllama ernie4_5 exaone4 flint gpt_bigcode granite_swa "
        "helium hunyuan_v1_dense jais2 ministral ministral3 mpt nanochat olmo3 openai-gpt persimmon vaultgemma "
        "xglm".split(),
        (DENSE, {}),
    ),
    **dict.fromkeys("flex_olmo mellum minimax_m2 olmoe phimoe".split(), (ROUTED, {})),
    **dict.fromkeys(
        "cohere2_moe granitemoe_swa granitemoeshared hunyuan_v1_moe kolibri1 qwen2_moe solar_open".split(), (SHARED, {})
    ),
    **dict.fromkeys(
        "afmoe dots1 ernie4_5_moe exaone_moe hy_v3".split(), ({*SHARED, DENSE_MLP}, {})
    ),
    "mimo_v2_flash": ({*ROUTED, DENSE_MLP}, {}),
    "laguna": ({*ROUTED, DENSE_MLP}, {}),  # peft would not find LoRA on its shared experts again
    "lfm3": ({*DENSE, LINEAR_ATTENTION}, {}),
    **dict.fromkeys("deepseek_v2 glm4_moe_lite axk1".split(), ({*SHARED, DENSE_MLP}, LATENT)),
    **dict.fromkeys("axk2 deepseek_v32 glm_moe_dsa hy_v4".split(), ({*SHARED, DENSE_MLP}, INDEXED)),
    **dict.fromkeys("minicpm3 youtu".split(), (DENSE, LATENT)),
    "seed_oss": (DENSE, {"residual_dropout": 0.0}),
    "deepseek_v4": (
        SHARED,
        dict(
            num_key_value_heads=1, o_groups=2, o_lora_rank=8, num_hidden_layers=3, head_dim=16,
            layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            mlp_layer_types=["moe", "moe", "moe"], partial_rotary_factor=0.5, index_n_heads=2, index_head_dim=8,
            compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}, index_topk=8,
        ),
    ),
}  # fmt: skip


def build(family: str, own: dict[str, Any]) -> Any:
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    known = vars(default).keys() | config_class.attribute_map.keys()
    fields = {
        name: 0.0 if "dropout" in name and isinstance(value, float) else FIELDS[name]
        for name, value in {**dict.fromkeys(known & FIELDS.keys()), **vars(default)}.items()
        if name in FIELDS or ("dropout" in name and isinstance(value, float))
    }
    if "qk_rope_head_dim" in known:
        fields.pop("head_dim", None)
    if getattr(default, "layer_types", None):
        fields["layer_types"] = ([*dict.fromkeys(default.layer_types)] * 2)[:2]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**{**fields, **own})).float().train()


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["exaone_moe", "glm_moe_dsa"]))
def test_the_first_step_is_that_of_single_conversations(family):
    kinds_trained, own = FAMILIES[family]
    model = build(family, own)
    kinds = module_kinds(model)
    freeze_untrained(model, kinds)
    assert _used(model) == [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"longest": tiny_models.LONGEST, "vocab_size": tiny_models.VOCAB_SIZE, "device": "cpu"}
    reason = enable_padding_free(copy.deepcopy(model), **options)
    assert reason is None or "index_topk" not in own
    form = ("padded" if reason else "flat") + ("" if supports_logits_to_keep(model) else ", all logits")
    assert trained(model, CONVERSATIONS, FORMS[form]).distance(one_by_one(model, CONVERSATIONS)) < 1e-5

    adapted = attach_lora(model, r=2, alpha=4, dropout=0.0, target_modules=["all-linear"])
    counts = kinds.count(adapted)
    assert {kind for kind, count in counts.items() if count.state == "trained"} == kinds_trained
    assert counts[ROUTER].state == ("frozen" if ROUTED_EXPERTS in kinds_trained else "absent")
    assert len(_used(adapted)) > 3


def _used(model: Any) -> list[Any]:
    """Return the parameters that a step gives a gradient."""
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    used = [parameter for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return used
