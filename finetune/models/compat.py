"""Patches of bitsandbytes, written for 0.50, and of transformers, written for 5.23."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

from finetune.models.module_kinds import full_shape


def keep_packing() -> None:
    """Keep 4-bit weights as they were packed for training, also where a model is evaluated on a CPU with AVX512-BF16.

    There a forward pass without gradients would repack them for good: frozen weights would change, later steps fail,
    results be those of bfloat16, and layers of fewer than 64 inputs could not run at all.
    """
    from bitsandbytes.nn import modules

    modules.has_avx512bf16 = lambda: False


@cache
def flatten_inputs_of_8_bits() -> None:
    """Let 8-bit layers multiply inputs of more than three dimensions (latent attention) as rows.

    bitsandbytes fails on them on a CPU, and elsewhere looks for outliers at wrong places.
    """
    from bitsandbytes.nn import Linear8bitLt

    multiply: Any = Linear8bitLt.forward

    @wraps(multiply)
    def forward(layer: Any, inputs: Any) -> Any:
        return multiply(layer, inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])

    Linear8bitLt.forward = forward  # type: ignore[assignment]


@contextmanager
def each_row_alone(model: Any) -> Iterator[None]:
    """Let 8-bit layers compute each token by itself: LLM.int8 picks columns with outliers by all tokens of a batch."""
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]
    before = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold


def leave_scales_out(model: Any) -> None:
    """Keep the scales of packed weights out of checkpoints, which hold no frozen weights.

    bitsandbytes adds them to the state of a layer, and cannot load those of an 8-bit layer that has run before.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def remove(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in [name for name in state if name.startswith((f"{prefix}weight", f"{prefix}SCB"))]:
            if name != f"{prefix}weight":
                del state[name]

    for module in model.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            module.register_state_dict_post_hook(remove)


@cache
def convert_by_whole_shapes() -> None:
    """Let transformers load and save weights that it converts by the model's shapes where ZeRO-3 partitions them.

    A partitioned parameter has no elements: experts in the layout of the memory would be transposed (Qwen3-VL-MoE),
    weights that are stored as one would not be split.
    """
    import torch
    from transformers.core_model_loading import Split, Transpose

    def by_whole_shapes(convert: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(convert)
        def converted(operation: Any, *tensors: Any, model: Any, **names: Any) -> Any:
            def empty(name: str) -> torch.Tensor:
                return torch.empty(full_shape(model.get_parameter(name)), device="meta")

            return convert(operation, *tensors, model=SimpleNamespace(get_parameter=empty), **names)

        return converted

    operations: tuple[Any, ...] = (Split, Transpose)
    for operation in operations:
        operation.convert = by_whole_shapes(operation.convert)


@cache
def make_masks_without_waiting() -> None:
    """Let transformers make the mask of a flat row under flash attention without asking the GPU for its positions.

    Flash attention is told the boundaries and takes no mask, but in each forward pass the host would wait for the
    answer, and so for the backward pass before it.
    """
    from transformers import masking_utils

    from finetune.models.segments import lengths_of_row

    prepare: Any = getattr(masking_utils, "_preprocess_mask_arguments", None)
    if prepare is None:  # a later transformers: slower, not wrong
        return

    @wraps(prepare)
    def prepared(
        config: Any, embeddings: Any, attention_mask: Any, past_key_values: Any, position_ids: Any, *others: Any
    ) -> Any:
        knows_boundaries = lengths_of_row() is not None and "flash" in config._attn_implementation
        positions = None if knows_boundaries else position_ids
        return prepare(config, embeddings, attention_mask, past_key_values, positions, *others)

    masking_utils._preprocess_mask_arguments = prepared  # type: ignore[assignment]
