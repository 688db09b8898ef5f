"""Check a base model before it is trained: stored tensors against the model's code, quantization, values.

transformers draws a weight at random that the files lack. What it would miss is found before anything is read: its own
loading runs on the meta device, with the names and shapes of the files, its renamings and conversions included
(transformers 5.23, `core_model_loading`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.models.model_folder import weight_map
from finetune.models.quantization import is_packed, is_packed_in_files
from finetune.models.stored_tensors import StoredTensors
from finetune.models.zero3 import values_here
from finetune.utils.errors import ConfigError, FinetuneError, format_names

if TYPE_CHECKING:
    import torch

# Buffers that older versions saved and the model's code computes: rotary frequencies, causal masks, positions, and the
# state of NVIDIA's FP8 layers.
COMPUTED_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|masked_bias|position_ids|_extra_state|(attn|attention|self_attention)\.bias)$"
)
# Tensors that bitsandbytes stores beside packed weights, in 4 and in 8 bits.
PACKED = re.compile(r"\.(quant_state\.|SCB$)")
EXPERT = re.compile(r"experts\.\d+(\.|$)")


@dataclass(frozen=True)
class WeightFaults:
    """Names of tensors whose files and model do not fit.

    Attributes:
        missing: Not in the files; transformers would draw them at random.
        unexpected: In the files, and not used by the model.
        misshapen: Each with its shape and the expected one.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]


def check_weights(
    folder: Path,
    empty: Any,
    config: Any,
    *,
    label: str,
    may_miss: Collection[str] | None = (),
    error: type[FinetuneError] = ConfigError,
) -> list[str]:
    """Check that the files of a model, if there are any, hold what its code expects; return notes for the user.

    Args:
        empty: Model on the meta device.
        config: Of the folder; it may describe more than `empty`, such as a vision tower.
        label: Names the model in messages.
        may_miss: Modules, by the last part of their names, whose weights may start at random; None: all.

    Raises:
        FinetuneError: Of the class `error`, naming tensors that are missing, unexpected or misshapen.
    """
    if not weight_map(folder, error=error):
        return []
    stored = StoredTensors(folder, error=error)
    if is_packed_in_files(config):  # their names and shapes are others
        joins = not any(EXPERT.search(name) for name, _ in empty.named_modules())
        if joins and any(EXPERT.search(name) and PACKED.search(name) for name in stored):
            raise error(
                f"{label}: bitsandbytes has packed its experts one by one, as transformers 4 kept them; transformers 5 "
                "joins experts, and cannot read these: give the model that it was made from, with --load_in_4bit True"
            )
        ignored = empty._keys_to_ignore_on_load_unexpected or []
        unused = [name for name in stored if any(re.search(pattern, name) for pattern in ignored)]
        text = "not loaded, and as they are quantized a full or merged model is saved without them"
        return [f"{text}: {format_names(unused)}"] if unused else []
    faults = find_faults(empty, stored)
    notes, reasons = [], []
    random = [name for name in faults.missing if may_miss is None or name.split(".")[-2:][0] in may_miss]
    missing = [name for name in faults.missing if name not in random]
    if random:
        notes.append(f"not in the files of {folder}, so they start at random: {format_names(random)}")
    if missing:
        reasons.append(f"the files lack {format_names(missing)}")
    if faults.unexpected and type(config) is not type(empty.config):
        notes.append(f"not loaded, because only the text model is trained: {format_names(faults.unexpected)}")
    elif faults.unexpected:
        text = f"{type(empty).__name__} does not use {format_names(faults.unexpected)}"
        (reasons if may_miss == () and not empty.is_custom_code() else notes).append(text)
    if faults.misshapen:
        reasons.append(f"of another shape are {format_names(faults.misshapen)}")
    if reasons:
        remedy = "copy the complete model again"
        if error is ConfigError and not faults.misshapen:
            remedy += (
                ", or start new weights at random with --allow_missing_weights True (under an adapter only layers in "
                "--modules_to_save)"
            )
        raise error(f"{label}: weights and config.json do not fit: {'; '.join(reasons)}: {remedy}")
    return notes


def find_faults(empty: Any, stored: StoredTensors) -> WeightFaults:
    """Compare stored tensors with a model on the meta device, as transformers would load them; it is used up."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    frozen = [name for name, parameter in empty.named_parameters() if not parameter.requires_grad]
    tensors = {name: torch.empty(stored.shape(name), device="meta") for name in stored}
    rules: Any = get_model_conversion_mapping(empty)
    for rule in rules:
        if getattr(rule, "force_cpu", False):  # of large weights (Qwen4-Exp); there are no values to move
            rule.force_cpu = False
    config = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=rules)
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(empty, tensors, config)
        empty.mark_tied_weights_as_initialized(info)
        empty.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        empty._adjust_missing_and_unexpected_keys(info)
        for name in frozen:
            empty.get_parameter(name).requires_grad_(False)
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
    if empty.is_custom_code():  # it may have buffers that nobody saves
        info.missing_keys = {name for name in info.missing_keys if not COMPUTED_BUFFERS.search(name)}
    missing, misshapen = [], []
    shapes = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info.mismatched_keys}
    for name in sorted({*info.missing_keys, *shapes, *info.conversion_errors}):
        parts = _as_stored(empty, name, expected)
        absent = [part for part in parts if part not in stored]
        wrong = [
            f"{part} {list(stored.shape(part))} instead of {list(shape)}"
            for part, shape in parts.items()
            if part in stored and stored.shape(part) != shape
        ]
        if name in info.missing_keys or (absent and list(parts) != [name]):
            missing += absent or [name]
        elif not wrong:
            found, wanted = shapes.get(name, (None, expected.get(name)))
            wrong = [f"{name} {list(found) if found else '(cannot be converted)'} instead of {list(wanted or ())}"]
        misshapen += wrong
    unexpected = (name for name in info.unexpected_keys if not COMPUTED_BUFFERS.search(name))
    return WeightFaults(_ordered(missing), _ordered(unexpected), _ordered(misshapen))


def _as_stored(model: Any, name: str, expected: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of files that form a weight, by the rules that its files use."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    shape = expected.get(name, ())
    try:
        parts = revert_weight_conversion(model, {name: torch.empty(shape, device="meta")})
    except Exception:  # a rule that forms several weights at once cannot revert one of them
        return {name: shape}
    return {part: tuple(tensor.shape) for part, tensor in parts.items()}


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    from transformers.core_model_loading import dot_natural_key

    return tuple(sorted(set(names), key=dot_natural_key))


def check_finite(model: Any, folder: Path, *, label: str) -> None:
    """Check that the loaded weights hold no NaN or infinity; under ZeRO-3 those of this rank's partitions.

    Raises:
        ConfigError: Naming the tensors, and the files that hold them.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if not (is_packed(parameter) or is_finite(values_here(parameter)))
    ]
    if not names:
        return
    stored = StoredTensors(folder, error=ConfigError)
    damaged = [name for name in stored if not is_finite(stored[name])]
    if not damaged:
        raise ConfigError(
            f"{label}: weights overflow in {str(model.dtype).removeprefix('torch.')}, though they are "
            f"finite in the files: {format_names(names)}: train in bf16 or float32"
        )
    raise ConfigError(
        f"{label}: tensors hold NaN or infinity: "
        f"{format_names([f'{name} in {stored.path(name).name}' for name in damaged])}: copy the model again, or ask "
        "whoever made it"
    )


def is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite; minimum and maximum need no memory, and NaN is both."""
    import torch

    if not values.is_floating_point() or not values.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())
