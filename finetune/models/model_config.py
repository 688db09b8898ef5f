"""Read the fields of model configs that families name differently, or that each layer has for itself (Gemma 4)."""

from typing import Any

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k", "moe_k",
)  # fmt: skip
ROUTER_LOSS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def by_layer(config: Any, name: str) -> list[Any]:
    """Return a field of the text model for each of its layers; None where it has none.

    transformers (5.23) raises a RuntimeError where a field that layers have for themselves is read from the whole.
    """
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False) and name in text.per_layer_attributes:
        return [getattr(layer, name, None) for layer in text.per_layer_config]
    return [getattr(text, name, None)] * (getattr(text, "num_hidden_layers", None) or 1)


def largest(config: Any, *names: str) -> int:
    """Return the largest value that a layer has for the first of these fields that is set; 0 where none is."""
    for name in names:
        values = [part for value in by_layer(config, name) for part in (value if isinstance(value, list) else [value])]
        if numbers := [value for value in values if value]:
            return max(numbers)
    return 0


def set_vocab_size(config: Any, rows: int) -> None:
    """Set the number of tokens of a model that is not built yet, as `resize_token_embeddings` does."""
    text = config.get_text_config()
    if rows != text.vocab_size and getattr(text, "hidden_size_per_layer_input", None):  # Gemma 3n and 4
        text.vocab_size_per_layer_input = rows
    text.vocab_size = rows


def experts_of(config: Any) -> tuple[int, int]:
    """Return the routed experts of a layer and how many of them each token takes; zeros without experts."""
    feed_forward = getattr(config.get_text_config(), "ffn_config", None)  # DBRX
    experts = largest(config, *EXPERTS) or getattr(feed_forward, "moe_num_experts", 0)
    chosen = largest(config, *EXPERTS_PER_TOKEN) or getattr(feed_forward, "moe_top_k", 0)
    return (experts, min(chosen, experts) or experts) if experts else (0, 0)


def router_loss_weight(config: Any) -> float:
    """Return the weight of the load-balancing loss of a mixture of experts."""
    text = config.get_text_config()
    places = (text, getattr(text, "ffn_config", None))
    return next(getattr(place, name) for place in places for name in ROUTER_LOSS if hasattr(place, name))


def attention_widths(config: Any) -> list[int]:
    """Return the number of heads times their width, of each layer."""
    hidden = largest(config, "hidden_size")
    heads, widths = by_layer(config, "num_attention_heads"), by_layer(config, "head_dim")
    counts = [max(count) if isinstance(count, list) else count or 0 for count in heads]
    return [count * (width or (hidden // count if count else 0)) for count, width in zip(counts, widths, strict=True)]
