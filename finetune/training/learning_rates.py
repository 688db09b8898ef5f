"""Learning rates of their own for some parameters: embeddings and head, and the matrices B of LoRA+.

Source: LoRA+ https://arxiv.org/abs/2402.12354. The schedule multiplies the rate of each group.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import Trainer

from finetune.config.adapter_arguments import AdapterArguments
from finetune.models.module_kinds import EMBEDDINGS, HEAD, ModuleKinds

LORA_B = re.compile(r"\.lora(_embedding)?_B(\.|$)")


def set_learning_rates(trainer: Trainer, adapter: AdapterArguments, kinds: ModuleKinds) -> None:
    """Let the Trainer build its optimizer with groups for the rates that the flags give, if they give any."""
    if adapter.embedding_learning_rate is None and adapter.loraplus_lr_ratio is None:
        return
    model: Any = trainer.model
    rate_of = partial(_rate, base=trainer.args.learning_rate, adapter=adapter, kinds=kinds)
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = parameter_groups(model, rate_of, decayed, trainer.args.weight_decay)
    optimizer, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    trainer.optimizer_cls_and_kwargs = (optimizer, {**options, "params": groups})


def parameter_groups(
    model: Any, rate_of: Callable[[str], float], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of one rate and weight decay each, in the order of the model."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((rate_of(name), weight_decay if name in decayed else 0.0), []).append(parameter)
    return [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in groups.items()]


def _rate(name: str, *, base: float, adapter: AdapterArguments, kinds: ModuleKinds) -> float:
    if adapter.embedding_learning_rate is not None and kinds.of(name) in (EMBEDDINGS, HEAD):
        return adapter.embedding_learning_rate
    return base * adapter.loraplus_lr_ratio if adapter.loraplus_lr_ratio and LORA_B.search(name) else base
