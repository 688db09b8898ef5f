"""Tiny random models of many families, conversations for them, and the same sums in float64 throughout.

Their weights are wide (`initializer_range` 0.2), so that a token that attends to a wrong one shows in the logits.
"""

from typing import Any

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode

VOCAB_SIZE = 200
LONGEST = 16  # tokens of the longest conversation in tests
WINDOW, CHUNK = 4, 8  # of families that have one: shorter than it

SIZES = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2)
WIDE_HEADS = dict(**GROUPED, head_dim=12)  # heads x width is not the hidden size
MIXED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts_per_tok=2)
PLAIN_ROTATION = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
LATENT = dict(q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
# family -> (prefix of its classes in transformers, what its config has besides SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "qwen3": ("Qwen3", WIDE_HEADS),
    "mistral": ("Mistral", dict(**GROUPED, sliding_window=WINDOW)),
    "gemma": ("Gemma", WIDE_HEADS),
    "gemma2": ("Gemma2", dict(**WIDE_HEADS, **MIXED, query_pre_attn_scalar=5, attn_logit_softcapping=2.0)),
    "gemma3": ("Gemma3", dict(**WIDE_HEADS, **MIXED)),
    "mixtral": ("Mixtral", dict(**GROUPED, **EXPERTS, num_local_experts=4)),
    "phi": ("Phi", dict(partial_rotary_factor=0.5)),
    "phi3": ("Phi3", GROUPED),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
    "opt": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0)),
    "gpt_oss": (
        "GptOss",
        dict(**WIDE_HEADS, **EXPERTS, **MIXED, num_local_experts=4, rope_parameters=PLAIN_ROTATION),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            **LATENT, **EXPERTS, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4,
            n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
        ),
    ),
    "mamba": ("Mamba", dict(state_size=4)),
    "jamba": (
        "Jamba",
        dict(
            **GROUPED, **EXPERTS, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
            mamba_dt_rank=4,
        ),
    ),
    "qwen3_next": (
        "Qwen3Next",
        dict(
            **WIDE_HEADS, **LINEAR, **EXPERTS, num_experts=4, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    ),
    "lfm2": ("Lfm2", dict(**GROUPED, layer_types=["conv", "full_attention"])),
    "bloom": ("Bloom", {}),
    "falcon": ("Falcon", dict(alibi=False)),
    "gptj": ("GPTJ", dict(rotary_dim=4)),
    "stablelm": ("StableLm", GROUPED),
    "llama4": (
        "Llama4",
        dict(
            **WIDE_HEADS, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=CHUNK,
            attn_temperature_tuning=False,
        ),
    ),
}  # fmt: skip
# Heads of another width in each kind of layer, and embeddings for each layer.
FAMILIES["gemma4"] = (
    "Gemma4",
    dict(
        **WIDE_HEADS, **MIXED, global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB_SIZE,
        num_kv_shared_layers=0,
    ),
)  # fmt: skip
# Models whose layers carry something from token to token: convolutions, recurrences.
ROUTED = dict(**EXPERTS, num_experts=4, moe_intermediate_size=16)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4)
STATES = dict(num_heads=8, head_dim=8, state_size=4, n_groups=1, chunk_size=4)
HYBRID = {
    "qwen3_5": ("Qwen3_5", dict(**WIDE_HEADS, **LINEAR)),
    "qwen3_5_moe": ("Qwen3_5Moe", dict(**WIDE_HEADS, **LINEAR, **ROUTED, shared_expert_intermediate_size=16)),
    "olmo_hybrid": ("OlmoHybrid", dict(**GROUPED, **LINEAR)),
    "kimi_linear": (
        "KimiLinear", dict(**GROUPED, **ROUTED, num_experts_per_token=2, n_routed_experts=4, head_dim=8),
    ),
    "lfm2_moe": ("Lfm2Moe", dict(**GROUPED, **ROUTED, layer_types=["conv", "full_attention"])),
    "bamba": ("Bamba", dict(**GROUPED, **MAMBA2, attn_layer_indices=[1])),
    "zamba2": (
        "Zamba2",
        dict(
            **GROUPED, mamba_d_state=4, mamba_ngroups=1, chunk_size=4, n_mamba_heads=8, mamba_headdim=8,
            num_mem_blocks=1, hybrid_layer_ids=[1], layer_types=["mamba", "hybrid"],
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(
            **GROUPED, ssm_state_size=4, mamba_num_heads=8, mamba_head_dim=8, n_groups=1, chunk_size=4,
            n_routed_experts=4, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
        ),
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        dict(
            **GROUPED, **MAMBA2, **EXPERTS, num_local_experts=4, shared_intermediate_size=16,
            layer_types=["mamba", "attention"],
        ),
    ),
    "mamba2": ("Mamba2", STATES),
    "falcon_mamba": ("FalconMamba", dict(state_size=4)),
    "falcon_h1": ("FalconH1", dict(**GROUPED, **MAMBA2, mamba_d_ssm=64)),
    "rwkv": ("Rwkv", dict(attention_hidden_size=32)),
    "xlstm": ("xLSTM", dict(num_heads=4, num_blocks=2)),
    "recurrent_gemma": (
        "RecurrentGemma", dict(**GROUPED, lru_width=32, block_types=["recurrent", "attention"]),
    ),
    "minimax": (
        "MiniMax",
        dict(
            **GROUPED, **EXPERTS, num_local_experts=4, block_size=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "bailing_hybrid": ("BailingHybrid", GROUPED),
    "qwen4_exp": (  # has embeddings of n-grams in parts, joined on the CPU, and a convolution that starts at zero
        "Qwen4Exp",
        dict(
            **WIDE_HEADS, **ROUTED, shared_expert_intermediate_size=16, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, hc_count=2, hc_lowrank=4,
            layer_types=["linear_attention", "indexed_attention"], indexer_n_heads=2, indexer_kv_heads=1,
            indexer_head_dim=12, indexer_budget=8, indexer_compress_ratio=2, ple_layer_ids=[1], ple_embed_dim=8,
            heads_per_ngram=2, ngram_vocab_size_base=50, make_ngram_vocab_size_divisible_by=4, split_ngram_parts=2,
        ),
    ),
}  # fmt: skip
HYBRIDS = ["qwen3_next", "lfm2", "jamba", "mamba", *HYBRID]
# Padded rows of the first two differ from single conversations.
OTHERS = {
    "doge": ("Doge", dict(**GROUPED, keep_window_size=WINDOW)),
    "cpmant": ("CpmAnt", dict(dim_head=8, dim_ff=48)),
    "jetmoe": ("JetMoe", dict(**GROUPED, **EXPERTS, kv_channels=8, num_local_experts=4)),
}
CONFIGS = {
    "Qwen3_5": "Qwen3_5TextConfig",
    "Qwen3_5Moe": "Qwen3_5MoeTextConfig",
    "Qwen4Exp": "Qwen4ExpTextConfig",
    "Gemma4": "Gemma4TextConfig",
    "Gemma3": "Gemma3TextConfig",
    "Llama4": "Llama4TextConfig",
}
MODELS = {"GPT2": "GPT2LMHeadModel"}


def build(family: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None, **changed: Any) -> Any:
    """A model in training mode, whose weights depend on its config alone.

    Args:
        attention: name of an attention of transformers; None: what transformers picks for the family.
        changed: fields of the config that go over those of the family.
    """
    prefix, own = {**FAMILIES, **HYBRID, **OTHERS}[family]
    if "vocab_size_per_layer_input" in own and "vocab_size" in changed:
        changed["vocab_size_per_layer_input"] = changed["vocab_size"]
    config = getattr(transformers, CONFIGS.get(prefix, f"{prefix}Config"))(**{**SIZES, **own, **changed})
    config._attn_implementation = attention
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the grouped product has no float64
    torch.manual_seed(0)
    model = getattr(transformers, MODELS.get(prefix, f"{prefix}ForCausalLM"))(config)
    return model.to(dtype).train()


def conversation(length: int, *learned: range, vocab_size: int = VOCAB_SIZE) -> dict[str, np.ndarray]:
    """An example of `length` random tokens, of which those in the ranges `learned` are learned."""
    ids = np.random.default_rng([length, vocab_size]).integers(3, vocab_size, length)
    labels = np.full(length, -100)
    for positions in learned:
        labels[positions] = ids[positions]
    return {"input_ids": ids, "labels": labels}


class InFloat64(TorchFunctionMode):
    """Inside this context code that asks for float32 gets float64: the norms, rotations and sums of models.

    Results then differ by rounding of 1e-16 alone, and a comparison need not tell mistakes from noise.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        if function is torch.Tensor.view:  # as another dtype: the bits decide which
            return function(*args, **(kwargs or {}))
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        kwargs = {name: torch.float64 if one is torch.float32 else one for name, one in (kwargs or {}).items()}
        return function(*args, **kwargs)
