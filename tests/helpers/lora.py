"""LoRA adapters in few words."""

from collections.abc import Sequence
from typing import Any

from finetune.config import AdapterArguments
from finetune.models import adapters


def attach_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float | None,
    target_modules: Sequence[str],
    base_revision: str | None = None,
    train_embeddings: bool = False,
    **flags: Any,
) -> Any:
    """`adapters.attach_peft` with these flags."""
    adapter = AdapterArguments(
        use_lora=True, lora_r=r, lora_alpha=alpha, lora_dropout=dropout, lora_target_modules=[*target_modules], **flags
    )
    return adapters.attach_peft(model, adapter, base_revision=base_revision, train_embeddings=train_embeddings)
