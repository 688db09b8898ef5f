"""Read the fields of model configs that families name differently, or that each layer has for itself (Gemma 4)."""

from types import SimpleNamespace
from typing import Any

from finetune.utils.errors import ConfigError

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k", "moe_k",
)  # fmt: skip
ROUTER_LOSS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


class StoredConfig(SimpleNamespace):
    """The values of a config.json as they are, without the names and defaults that transformers gives them."""

    def get_text_config(self) -> "StoredConfig":
        """Return the part about the text model, as the method of transformers' configs."""
        nested = getattr(self, "text_config", None)
        return StoredConfig(**nested) if isinstance(nested, dict) else self


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
    return next((max(numbers) for name in names if (numbers := _numbers(config, name))), 0)


def _numbers(config: Any, name: str) -> list[int]:
    """Return the different numbers that layers have for a field, in their order."""
    values = [part for value in by_layer(config, name) for part in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(value for value in values if value and isinstance(value, int)))


def check_attention_heads(size: int, config: Any) -> None:
    """Check that each of the `size` ranks that share a conversation gets the same share of the attention heads."""
    heads, key_heads = _numbers(config, "num_attention_heads"), _numbers(config, "num_key_value_heads")
    reasons = [f"it does not divide the model's {count} attention heads" for count in heads if count % size]
    reasons += [
        f"the model's {count} key heads neither divide it nor are divided by it"
        for count in key_heads
        if count % size and size % count
    ]
    if reasons:
        raise ConfigError(f"--sequence_parallel_size {size}: " + "; ".join(reasons))


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
