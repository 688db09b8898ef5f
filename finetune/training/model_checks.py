"""Check a run against its model, without weights: attention, adapter, vocabulary, positions, sequence parallelism."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.adapter_arguments import AdapterArguments
from finetune.config.deepspeed_optimizers import operators_of
from finetune.config.optional_packages import check_quantization
from finetune.config.run_config import ActivationCheckpointing, RunConfig
from finetune.dataset.prepare import PreparedData
from finetune.distributed.op_builder import build_notes
from finetune.models.adapters import check_attachable
from finetune.models.auto_class import auto_class
from finetune.models.embeddings import embedding_names
from finetune.models.freezing import freeze
from finetune.models.loader import ModelInfo, damage_named, embedding_rows, inspect_model, needs_new_embeddings
from finetune.models.model_config import check_attention_heads
from finetune.models.module_kinds import VISION
from finetune.models.quantization import is_packed_in_files
from finetune.utils.console import log_notes
from finetune.utils.errors import SHOWN_NAMES, ConfigError, first_line, format_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|positions?_embed\w*)$")

TEXT_INPUTS = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "past_key_values", "use_cache", "labels",
               "logits_to_keep", "kwargs"}  # fmt: skip


def check_model(config: RunConfig) -> tuple[RunConfig, ModelInfo]:
    """Inspect the model, and adapt the config to what its code can do.

    Raises:
        ConfigError: what the model cannot do.
    """
    saved = config.adapter.saved_modules()
    info = inspect_model(config.model, config.hardware.attention, saved if config.model.allow_missing_weights else ())
    if is_packed_in_files(info.config):
        label = f"{info.flag} (stored in {info.bits} bits)"
        check_quantization(info.bits, label, config.adapter, config.zero_stage)
    check_reads_text(info)
    adapter_notes = check_attachable(info, config.adapter, adds_tokens=bool(config.model.new_tokens))
    check_attention_heads(config.batch.sequence_parallel_size, info.config)
    checkpointing, notes = resolve_activation_checkpointing(
        config.activation_checkpointing, config.adapter.kind(), info.empty.supports_gradient_checkpointing
    )
    if weight := getattr(info.config.get_text_config(), "z_loss_coefficient", 0):  # Bamba
        notes.append(f"z_loss_coefficient {weight:g} of the model's config is left out: the loss is the cross-entropy")
    if config.deepspeed is not None:
        names = operators_of(config.deepspeed.config, use_cpu=config.hardware.use_cpu)
        notes += build_notes(Path(os.environ["TORCH_EXTENSIONS_DIR"]), names)
    adapted = replace(
        config,
        hardware=replace(config.hardware, attention=info.attention),
        activation_checkpointing=checkpointing,
        notes=(*config.notes, *info.notes, *adapter_notes, *notes),
    )
    return adapted, info


def check_reads_text(info: ModelInfo) -> None:
    """Check that a model generates token by token (DiffusionGemma does not), and that one of several modalities runs
    without images and sound, as training does: on the meta device.

    Raises:
        ConfigError: it does not, its code asks for another input, or has no embeddings of text.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not (info.empty.is_custom_code() or hasattr(info.empty, "prepare_inputs_for_generation")):
        raise ConfigError(
            f"{info.flag}: {type(info.empty).__name__} does not generate token by token (it has no "
            "prepare_inputs_for_generation): give a causal language model"
        )
    try:
        info.empty.get_input_embeddings()
    except NotImplementedError:  # Qwen2.5-Omni, of several models
        raise ConfigError(
            f"{info.flag}: {type(info.empty).__name__} names no embeddings of text: give the language model in it"
        ) from None
    if auto_class(info.config) is AutoModelForCausalLM and VISION not in info.kinds.by_module.values():
        return
    try:
        with torch.no_grad():
            info.empty(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=False)
    except Exception as error:  # also of layers that need values, which there are none of on this device
        others = signature(info.empty.forward).parameters.keys() - TEXT_INPUTS
        asks = isinstance(error, TypeError | ValueError) and others & set(re.findall(r"\w+", str(error)))
        if asks or "broadcast" in str(error):  # or codes of sound beside each token (Kyutai)
            raise ConfigError(
                f"{info.flag}: {type(info.empty).__name__} does not run on text alone: "
                f"{first_line(error).rstrip('.')}: give its text model, or one that reads text without images or sound"
            ) from None


def resolve_activation_checkpointing(
    requested: ActivationCheckpointing, adapter: str | None, supported: bool
) -> tuple[ActivationCheckpointing, list[str]]:
    """Switch activation checkpointing off where the kind of adapter or the model's code does not support it.

    Returns:
        What is done, and lines for the user.
    """
    reason = None
    if adapter == "prefix":
        reason = "prefix tuning passes a cache to each layer, which checkpointing would drop"
    elif not supported:
        reason = "this model's code does not support it"
    if requested.enabled and reason:
        return replace(requested, enabled=False), [f"--activation_checkpointing is off: {reason}"]
    return requested, requested.notes()


def check_against_data(
    config: RunConfig, info: ModelInfo, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> RunConfig:
    """Check vocabulary and positions of the model against the prepared data; return the config with notes."""
    adds_tokens = bool(config.model.new_tokens)
    notes = check_vocabulary(info, tokenizer, config.adapter, adds_tokens=adds_tokens)
    notes += check_positions(info, data.longest, config.adapter)
    log_notes(notes)
    return replace(config, notes=(*config.notes, *notes))


def check_vocabulary(
    info: ModelInfo, tokenizer: PreTrainedTokenizerBase, adapter: AdapterArguments, *, adds_tokens: bool
) -> list[str]:
    """Check that embeddings which grow for tokens of the tokenizer are meant to be trained; return notes."""
    if not needs_new_embeddings(info, tokenizer):
        return []
    rows, known = embedding_rows(tokenizer), info.config.get_text_config().vocab_size
    names, kind = embedding_names(info.empty), adapter.kind()
    tokens = tokenizer.convert_ids_to_tokens(list(range(known, min(rows, known + SHOWN_NAMES))))
    grows = f"the tokenizer has {rows:,} tokens, the model embeddings for {known:,}: none for {format_names(tokens)}"
    if kind is None and (frozen := _frozen_embeddings(info, adapter)):
        raise ConfigError(
            f"{grows}. --freeze or --train_only keeps {format_names(frozen)} from training, and with it the new rows: "
            "train these too, or use the model's own tokenizer"
        )
    if kind in ("prefix", "prompt"):
        raise ConfigError(f"{grows}: --adapter {kind} cannot train embeddings: use --use_lora True")
    saved = set(names) & set(adapter.saved_modules() or ())
    if info.adapter and (trained := _saved_rows(Path(info.adapter), saved)) != rows:
        raise ConfigError(
            f"{grows}. The adapter {info.adapter} holds {f'{trained:,} trained' if trained else 'no'} embeddings, and "
            "takes no more: merge it and train the merged model, or use the adapter's own tokenizer"
        )
    size = rows * sum(
        module.weight.shape[1] for name, module in info.empty.named_modules() if name.rpartition(".")[2] in names
    )
    if kind and not adds_tokens and not set(names) <= set(adapter.saved_modules() or ()):
        raise ConfigError(
            f"{grows}. With an adapter all of {' and '.join(names)} would be trained and saved in full, {size:,} of "
            f"the model's {info.parameters:,} parameters: ask for it with --modules_to_save {' '.join(names)}, or use "
            "the model's own tokenizer"
        )
    how = f"{' and '.join(names)} ({size:,} parameters) are trained in full" if kind else "all rows are trained"
    return [f"{grows}; the embeddings grow, new rows start near the mean of the others, and {how}"]


def _frozen_embeddings(info: ModelInfo, adapter: AdapterArguments) -> list[str]:
    """Return the weights with a row per token that the flags freeze where all parameters are trained."""
    model, names = deepcopy(info.empty), embedding_names(info.empty)
    freeze(model, info.kinds, adapter.freeze, adapter.train_only)
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    return [name for name in frozen if name.removesuffix(".weight").rpartition(".")[2] in names]


def _saved_rows(folder: Path, names: Iterable[str]) -> int:
    """Return the rows of the layers with these names that a saved adapter holds in full; 0: it holds none."""
    from peft import load_peft_weights

    with damage_named(f"the adapter {folder}"):
        weights = load_peft_weights(str(folder), device="cpu")
    ends = {f"{name}.weight" for name in names}
    return next((len(weight) for name, weight in weights.items() if ".".join(name.split(".")[-2:]) in ends), 0)


def check_positions(info: ModelInfo, longest: int, adapter: AdapterArguments) -> list[str]:
    """Check the longest example against the positions of the model; return notes for the user.

    Args:
        longest: tokens of the longest example.

    Raises:
        ConfigError: it is longer than the table of position embeddings.
    """
    config = info.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    virtual = adapter.virtual_tokens()
    length = longest + virtual
    text = f"the longest example has {longest:,} tokens" + (f" and {virtual:,} virtual ones" if virtual else "")
    if not isinstance(limit, int) or length <= limit:
        return []
    if any(POSITION_TABLE.search(name) and hasattr(module, "num_embeddings") and info.kinds.of(name) != VISION
           for name, module in info.empty.named_modules()):  # fmt: skip
        raise ConfigError(
            f"{text}, the model {info.name} has {limit:,} position embeddings: give --model_max_length "
            f"{limit - virtual}"
        )
    rules = getattr(config, "rope_parameters", None)
    if not rules:
        return []
    trained, scaling = _trained_positions(rules, limit)
    if length <= trained:
        return []
    return [
        f"{text}, but the model was made for {trained:,} positions ({scaling}): --model_max_length {trained - virtual} "
        "stays within them"
    ]


def _trained_positions(rules: dict[str, Any], limit: int) -> tuple[int, str]:
    """Return the positions that rotary embeddings are made for, RoPE scaling included, and how they are computed.

    https://huggingface.co/docs/transformers/main/en/internal/rope_utils: `factor` multiplies
    `original_max_position_embeddings`, or `max_position_embeddings` where that is not given.
    """
    layers = [rule for rule in rules.values() if isinstance(rule, dict)] or [rules]
    trained, text = limit, f"max_position_embeddings {limit:,}"
    for rule in layers:
        kind, factor = rule.get("rope_type", "default"), rule.get("factor")
        original = rule.get("original_max_position_embeddings") or limit
        if kind != "default" and factor and round(original * factor) > trained:
            trained, text = round(original * factor), f"RoPE scaling {kind}, {original:,} x {factor:g}"
    return trained, text
