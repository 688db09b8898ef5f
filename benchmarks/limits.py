"""What no contender can pass: the arithmetic that is left, and how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

REPEATS = 5


@dataclass(frozen=True)
class Sizes:
    """A Llama's sizes."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """The sizes in a config of transformers."""
        return cls(
            config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads,
            config.num_hidden_layers, config.vocab_size,
        )  # fmt: skip

    @property
    def products(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear maps of one layer."""
        keys = self.hidden // self.heads * self.key_heads
        attention = [(self.hidden, self.hidden), (self.hidden, keys), (self.hidden, keys), (self.hidden, self.hidden)]
        return [*attention, (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]


def padding_and_logits_limit(sizes: Sizes, useful: float, supervised: float, adapter: str) -> float:
    """How many times the stock Trainer's rate is left to gain: without padding, and without unused logits.

    1 / useful share of the padded positions x 1 / (1 - head's share of the arithmetic x share of tokens that are not
    supervised). A trained weight costs 6 operations a position, a frozen one 4 (Kaplan et al., 2020); attention is left
    out, which makes the head's share, and so the limit, a little too large.

    With a head as large as all the rest:

    >>> sizes = Sizes(hidden=2, inner=2, heads=1, key_heads=1, layers=1, vocabulary=14)
    >>> round(padding_and_logits_limit(sizes, useful=0.5, supervised=0.5, adapter="full"), 4)
    2.6667
    """
    cost = 6 if adapter == "full" else 4
    body = cost * sizes.layers * sum(inputs * outputs for inputs, outputs in sizes.products)
    head = cost * sizes.hidden * sizes.vocabulary
    return 1 / useful / (1 - head / (body + head) * (1 - supervised))


def roof_tokens_per_second(sizes: Sizes, tokens: int, supervised: int, adapter: str, threads: int) -> float:
    """Tokens per second if a step of so many tokens, `supervised` of them, were its matrix products and nothing else.

    Each product runs by itself in its own shape, forwards and for both gradients (with LoRA, for that of its input).
    """
    import torch

    torch.set_num_threads(threads)
    seconds = sizes.layers * sum(_seconds(tokens, inputs, outputs, adapter) for inputs, outputs in sizes.products)
    return tokens / (seconds + _seconds(supervised, sizes.hidden, sizes.vocabulary, adapter))


def _seconds(rows: int, inputs: int, outputs: int, adapter: str) -> float:
    import torch

    x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    products = [(x, weight.t()), (gradient, weight)] + ([(gradient.t(), x)] if adapter == "full" else [])
    return sum(_fastest(*pair) for pair in products)


def _fastest(left: Any, right: Any) -> float:
    import torch

    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return min(times)
