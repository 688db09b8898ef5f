"""Examples -> a padded batch.

What is padding is decided by length, never by id: a pad token that equals the end-of-turn token hides nothing.

    two examples    [5 6 7]  and  [8 9]

    input_ids       5 6 7          attention_mask  1 1 1        labels  -100   6   7
                    8 9 p                          1 1 0                -100   9 -100
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.rendering import IGNORE_INDEX


@dataclass(frozen=True)
class PaddedCollator:
    """Callable for a data loader: features with `input_ids` and `labels` -> tensors of shape [rows, longest]."""

    pad_token_id: int

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad on the right to the longest row of the batch; int64 tensors, and two counts that are plain numbers."""
        import torch

        lengths = [len(feature["input_ids"]) for feature in features]
        longest = max(lengths)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([feature[name] + [filler] * (longest - len(feature[name])) for feature in features])

        mask = [[1] * length + [0] * (longest - length) for length in lengths]
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORE_INDEX),
            "num_tokens": sum(lengths),
            "num_supervised_tokens": sum(label != IGNORE_INDEX for feature in features for label in feature["labels"]),
        }


def pad_token_id(tokenizer: Any) -> int:
    """The tokenizer's pad id, else its end token's, else 0: masked by length, so any id will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    return 0
