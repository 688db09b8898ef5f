"""The class that a model is loaded with: the whole of a checkpoint, its vision tower included, not its text alone."""

from typing import Any


def auto_class(config: Any) -> Any:
    """Return the class of transformers whose `from_pretrained` and `from_config` build the model of a checkpoint.

    Of some checkpoints with images `AutoModelForCausalLM` builds the language model alone: what it saves has no vision
    tower, and adapters for it have names that do not fit the whole model.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    kind = type(config)
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING or has_own_code or getattr(config, "is_encoder_decoder", False):
        return AutoModelForCausalLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        text_class = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
        if getattr(text_class, "__name__", "") in (config.architectures or ()):
            return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def empty_model(config: Any, **options: Any) -> Any:
    """Return the model of a config on the meta device; `options` are those of `from_config`."""
    import torch

    with torch.device("meta"):
        return auto_class(config).from_config(config, **options)
