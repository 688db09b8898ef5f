"""Adapters: attach one to a model, count trainable parameters, save and check.

Sources: LoRA https://arxiv.org/abs/2106.09685, DoRA 2402.09353, rsLoRA 2312.03732, PiSSA 2404.02948, OLoRA 2406.01775,
prefix tuning 2101.00190, prompt tuning 2104.08691; all of them as implemented by peft.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.adapter_arguments import LORA_DROPOUT, AdapterArguments
from finetune.config.hardware import Precision
from finetune.config.saved_adapter import MOVES_BASE, recorded_weights
from finetune.models.embeddings import check_token_ids, embedding_names, is_tied
from finetune.models.freezing import freeze
from finetune.models.loader import ModelInfo, damage_named, freeze_untrained, needs_new_embeddings, torch_dtype
from finetune.models.lora_targets import (
    ALL_LINEAR,
    LoraTargets,
    linear_names,
    named_modules,
    parse_target_modules,
    resolve_targets,
    text_layers,
)
from finetune.models.model_folder import weights_fingerprint
from finetune.models.module_kinds import EMBEDDINGS, HEAD, ROUTED_EXPERTS, VISION, full_shape, output_embeddings
from finetune.models.quantization import quantized_layers
from finetune.models.zero3 import gathered
from finetune.run_dir.run_json import ADAPTER_CONFIG
from finetune.utils.errors import CheckpointError, ConfigError, first_line, format_names
from finetune.utils.user_files import MALFORMED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Fields of a saved adapter's configuration that are those of its run.
OF_THIS_RUN = {"inference_mode": False, "base_model_name_or_path": None, "peft_version": None, "auto_mapping": None}
ADAPTER_FILE = "adapter_model.safetensors"
NOT_ON_EXPERTS = ("lora_dropout", "use_dora", "init_lora_weights", "layers_to_transform")


def attach_adapter(
    base: Any,
    adapter: AdapterArguments,
    info: ModelInfo,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int | None = None,
    precision: Precision | None = None,
    computes_initial: bool = True,
) -> Any:
    """Return the base model with the adapter that the flags describe, if any.

    Args:
        info: of the base.
        tokenizer: embeddings are trained too where it has tokens without one.
        seed: of the drawn matrices; the Trainer sets it only later, and loading draws numbers under ZeRO-3.
        precision: of what is trained; None: that of the base.
        computes_initial: start as --init_lora_weights says, or as saved; else plain, for a model without weights.

    Raises:
        ConfigError: no such module, or peft rejects an option.
    """
    if adapter.kind() is None:
        freeze(base, info.kinds, adapter.freeze, adapter.train_only)
        return base
    if seed is not None:
        from transformers import set_seed

        set_seed(seed)
    if info.adapter is not None:
        options: dict[str, Any] = {"base_revision": info.revision, "loads_weights": computes_initial}
        return load_adapter(base, Path(info.adapter), precision=precision, **options)
    grows = tokenizer is not None and needs_new_embeddings(info, tokenizer)
    model = attach_peft(
        base, adapter, base_revision=info.revision, train_embeddings=grows, computes_initial=computes_initial
    )
    return _converted(model, precision)


def attach_peft(
    model: Any,
    adapter: AdapterArguments,
    *,
    base_revision: str | None = None,
    train_embeddings: bool = False,
    computes_initial: bool = True,
) -> Any:
    """Attach what the flags describe and freeze the rest; return the `PeftModel`.

    Args:
        base_revision: Revision of the base model's repository, stored in the adapter.
        train_embeddings: Also train and save the embeddings and the head, because new tokens start untrained.
        computes_initial: As in `attach_adapter`.

    Raises:
        ConfigError: A name matches no layer, or peft rejects an option.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    options = {**adapter.peft_options(), "task_type": TaskType.CAUSAL_LM, **OF_THIS_RUN}
    method = options["peft_type"]
    label = "LoRA" if method == "LORA" else f"peft's {method}"
    config_class = dict(PEFT_TYPE_TO_CONFIG_MAPPING).get(method)
    if config_class is None:
        known = ", ".join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ConfigError(f"--adapter_config: peft {version('peft')} has no method {method}: expected one of {known}")
    if unknown := sorted(set(options) - {declared.name for declared in fields(config_class)}):
        raise ConfigError(f"--adapter_config: {label} has no option {', '.join(unknown)}")
    if not hasattr(model, "prepare_inputs_for_generation"):
        reason = "has no prepare_inputs_for_generation, which peft needs: train it in full (--use_lora False)"
        raise ConfigError(f"{label} cannot be attached: {type(model).__name__} {reason}")
    check_token_ids(model, options)
    saved = named_modules(model, options.get("modules_to_save") or ())
    if train_embeddings:
        saved += [name for name in embedding_names(model) if name not in saved]
    ties, ends = is_tied(model), embedding_names(model, with_head=True)[:2]
    if ties and not (method == "LORA" and set(ends) <= set(EMBEDDING_LAYER_NAMES)):
        ties = False  # peft trains a copy of each, and of one alone would leave the other as it is
        saved += [name for name in ends if name not in saved] if set(ends) & set(saved) else []
    if saved:
        options["modules_to_save"] = saved
    if method == "LORA" and not (options.get("exclude_modules") or options.get("target_parameters")):
        options |= _resolved(model, options).options(model)
    else:
        options |= text_layers(model, options)
    if method == "LORA":
        options["ensure_weight_tying"] = ties and bool(saved)
        options["init_lora_weights"] = options.get("init_lora_weights", True) if computes_initial else True
    try:
        # In the precision of the base; DeepSpeed converts to it under ZeRO-1 and 2 and keeps float32 master weights.
        # peft's default is float32, which ZeRO-3 would keep: the stages would compute different numbers.
        adapted = get_peft_model(model, config_class(**options), autocast_adapter_dtype=False, revision=base_revision)
        if not _trained(adapted):
            raise ValueError("it fits no layer of the model")
        return adapted
    except (*MALFORMED, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) and "meta" in str(error).lower():  # of torch: there are no values yet
            raise
        is_whole = not any(isinstance(module, BaseTunerLayer) for module in model.modules())  # else names of peft's
        layers = f"; its {linear_names(model)}" if is_whole else ""
        raise ConfigError(f"{label} cannot be attached: {error}{layers}") from None


def _converted(model: Any, precision: Precision | None) -> Any:
    """Return the model with what is trained in this precision."""
    if precision is not None:
        for parameter in _trained(model):
            parameter.data = parameter.data.to(torch_dtype(precision))
    return model


def load_adapter(
    model: Any,
    folder: Path,
    *,
    base_revision: str | None,
    precision: Precision | None = None,
    loads_weights: bool = True,
) -> Any:
    """Attach a saved adapter with all that its config says, to train it further; return the `PeftModel`.

    Args:
        precision: As in `attach_adapter`.
        loads_weights: False where the model has none.

    Raises:
        ConfigError: It does not fit the model.
    """
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    label = f"the adapter {folder}"
    with damage_named(label):
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode, config.revision = False, base_revision
        adapted = _converted(get_peft_model(model, config, autocast_adapter_dtype=False), precision)
    if not loads_weights:
        return adapted
    with damage_named(f"{label} does not fit its base"), gathered(_trained(adapted), changes=True):
        loaded: Any = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    unmatched = [*sorted(trained & set(loaded.missing_keys)), *loaded.unexpected_keys]
    if unmatched and not config.is_prompt_learning:
        raise ConfigError(f"{label} does not fit its base: {format_names(unmatched)}: give its base")
    return adapted


def _resolved(model: Any, options: dict[str, Any]) -> LoraTargets:
    """Resolve the target modules of these options for a model without an adapter, and set its dropout for them."""
    wanted = options.get("target_modules") or ALL_LINEAR
    targets = resolve_targets(model, parse_target_modules([wanted] if isinstance(wanted, str) else wanted))
    saved = [f".{name}." for name in options.get("modules_to_save") or ()]  # layers inside of which peft leaves out
    parameters = (name for name in targets.parameters if not any(part in f".{name}" for part in saved))
    targets = replace(targets, parameters=tuple(parameters))
    _check_wrapped(targets, options)
    start, head = options.get("init_lora_weights"), output_embeddings(model)
    if start == "olora" and targets.options(model)["fan_in_fan_out"]:
        layers = f"{type(model).__name__} stores transposed weights"
        raise ConfigError(f"--init_lora_weights olora: {layers}, of which peft takes no account: give pissa")
    if is_tied(model) and str(start).startswith(MOVES_BASE):
        if tied := [name for name in targets.modules if model.get_submodule(name) is head]:
            raise ConfigError(
                f"--init_lora_weights {start}: it moves the weight of {tied[0]}, which is that of the embeddings, too: "
                "leave it out, or name other layers in --lora_target_modules"
            )
    if options.get("lora_dropout", 0.0) is None:
        options["lora_dropout"] = 0.0 if targets.parameters else LORA_DROPOUT
    return targets


def _check_wrapped(targets: LoraTargets, options: dict[str, Any]) -> None:
    """Check that the options hold for weights that peft wraps as parameters: those of fused experts."""
    values = {name: options.get(name) for name in NOT_ON_EXPERTS}
    if values["init_lora_weights"] in (True, "gaussian"):
        del values["init_lora_weights"]
    refused = [f"--{name} {value}" for name, value in values.items() if value]
    if targets.parameters and refused:
        raise ConfigError(
            f"{', '.join(refused)}: peft cannot do this with the weights of fused experts "
            f"({_parameter_names(targets.parameters)}): leave it out, or name other layers in --lora_target_modules"
        )


def _parameter_names(names: Iterable[str]) -> str:
    """Return the last two parts of the names of parameters, each once."""
    return format_names(sorted({".".join(name.split(".")[-2:]) for name in names}))


def check_attachable(info: ModelInfo, adapter: AdapterArguments, *, adds_tokens: bool = False) -> list[str]:
    """Attach the adapter to the model on the meta device, or freeze it as the flags say; return notes for the user.

    Args:
        adds_tokens: New tokens will make embeddings trained.

    Raises:
        ConfigError: No such module, peft rejects an option, or nothing has the learning rate of a flag.
    """
    import torch

    trained_on = recorded_weights(Path(info.adapter)) if info.adapter else None
    if trained_on and (weights := weights_fingerprint(info.name, info.revision)) not in (None, trained_on):
        raise ConfigError(
            f"{info.flag}: the adapter {info.adapter} was trained on other weights (fingerprint {trained_on[:12]}, "
            f"here {str(weights)[:12]}): give its base"
        )
    notes = _check_quantized(info, adapter) if info.bits else []
    base = deepcopy(info.empty)
    freeze_untrained(base, info.kinds)
    try:
        with torch.device("meta"):
            model = attach_adapter(base, adapter, info, None, computes_initial=False)
    except (NotImplementedError, RuntimeError) as error:  # it computes from weights that are not there yet
        if adapter.adapter_config is None:
            raise
        return [*notes, f"--adapter_config: checked only once the model is loaded: {first_line(error)}"]
    counts = info.kinds.count(model)
    if adapter.kind() and counts[VISION].trained:
        raise ConfigError(f"{adapter.kind()}: the adapter would train {VISION}, which text does not: name other layers")
    rate, trained = adapter.embedding_learning_rate, counts[EMBEDDINGS].trained + counts[HEAD].trained
    if rate and not trained and not adds_tokens:
        raise ConfigError(
            f"--embedding_learning_rate {rate:g}: neither embeddings nor head are trained: give --modules_to_save "
            f"{' '.join(embedding_names(info.empty))}, or leave it out"
        )
    if adapter.kind() is None or info.adapter or adapter.peft_options().get("lora_dropout", 0.0) is not None:
        return notes
    targets = resolve_targets(info.empty, parse_target_modules(adapter.lora_target_modules))
    if targets.parameters:
        of_experts = f"peft wraps the weights of experts ({_parameter_names(targets.parameters)})"
        notes.append(f"--lora_dropout is 0, not {LORA_DROPOUT}: {of_experts}")
    return notes


def _check_quantized(info: ModelInfo, adapter: AdapterArguments) -> list[str]:
    """Check that no layer that is quantized is trained in full; return a note about experts that are not quantized."""
    layers = quantized_layers(info.empty)
    packed = [f".{name}." for name in layers]
    if in_full := [name for name in adapter.saved_modules() or () if any(f".{name}." in path for path in packed)]:
        raise ConfigError(
            f"--modules_to_save {' '.join(in_full)}: --load_in_{info.bits}bit quantizes these layers, and such weights "
            "cannot be trained: leave them out"
        )
    size = sum(math.prod(full_shape(layer.weight)) for layer in layers.values())
    whole = [name for name, _ in info.empty.named_parameters() if info.kinds.of(name) == ROUTED_EXPERTS
             and name.rpartition(".")[0] not in layers]  # fmt: skip
    if not whole:
        return []
    return [
        f"{info.bits} bits: {size:,} of {info.parameters:,} parameters are quantized: bitsandbytes quantizes linear "
        f"layers, not experts that share a parameter ({_parameter_names(whole)})"
    ]


def count_parameters(model: Any) -> tuple[int, int]:
    """Count (trainable, all) parameters, also where they are partitioned (ZeRO-3) or packed (4 bits)."""
    counts = [(parameter.requires_grad, math.prod(full_shape(parameter))) for parameter in model.parameters()]
    return sum(size for trainable, size in counts if trainable), sum(size for _, size in counts)


def _trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class InitialLora:
    """The initial LoRA matrices of PiSSA or OLoRA, needed to save a plain LoRA for the original base.

    Both move s·B0·A0 from the base weight W into the adapter, so the tuned layer computes W - s·B0·A0 + s·B·A. On the
    original W that is a LoRA of rank 2r: [B, -B0]·[A; A0], with the same scale s. A layer with fewer than r inputs or
    outputs gets matrices of a lower rank from peft, which zeros fill up.
    """

    def __init__(self, model: Any) -> None:
        with gathered(_trained(model)):
            self.tensors = {
                name.replace(".default", ""): parameter.detach().cpu().clone()
                for name, parameter in model.named_parameters()
                if ".lora_" in name
            }
        layers = {name: getattr(module, "r", None) for name, module in model.named_modules()}
        self.ranks = {name: ranks["default"] for name, ranks in layers.items() if isinstance(ranks, dict) and ranks}

    def rewrite(self, folder: Path) -> None:
        """Replace a saved adapter by its plain form of rank 2r."""
        import torch
        from safetensors.torch import load_file, save_file

        for name, trained in (saved := load_file(folder / ADAPTER_FILE)).copy().items():
            if part := re.search(r"\.lora_(?:embedding_)?([AB])(?:\.|$)", name):
                is_b, initial = part[1] == "B", self.tensors[name].to(trained.dtype)
                both = torch.cat([trained, -initial if is_b else initial], dim=int(is_b))
                missing = 2 * self.ranks[name[: part.start()]] - both.shape[is_b]
                saved[name] = torch.nn.functional.pad(both, (0, missing) if is_b else (0, 0, 0, missing)).contiguous()
        save_file(saved, folder / ADAPTER_FILE, metadata={"format": "pt"})
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # Keep the scale alpha / r, with rsLoRA alpha / sqrt(r).
        factor = 2**0.5 if config["use_rslora"] else 2
        config.update(r=config["r"] * 2, lora_alpha=config["lora_alpha"] * factor, init_lora_weights=True)
        config["rank_pattern"] = {name: rank * 2 for name, rank in config["rank_pattern"].items()}
        config["alpha_pattern"] = {name: alpha * factor for name, alpha in config["alpha_pattern"].items()}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def gather_virtual_tokens(model: Any, *, saves: bool) -> Iterator[None]:
    """Gather a prefix or prompt adapter inside the block, so that the ranks with `saves` can save it.

    peft runs the prompt encoder to compute what it saves. Under ZeRO-3 its weights are partitioned: a rank that runs it
    alone would wait forever for the others. So they run it, too: DeepSpeed records the order in which modules run, and
    ranks with different orders would block each other in the next step.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        yield
        return
    with gathered(_trained(model)):
        if not saves:
            model.get_prompt_embedding_to_save(model.active_adapter)
        yield


def check_saved_adapter(folder: Path) -> None:
    """Check that a saved adapter is complete and was trained.

    Raises:
        CheckpointError: The file is missing, a tensor is empty (a ZeRO-3 parameter that was not gathered) or not
            finite, or all LoRA B matrices are zero.
    """
    import torch
    from safetensors import safe_open

    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} was not written")
    num_b = num_trained = 0
    with safe_open(path, framework="pt") as file:
        if not list(file.keys()):
            raise CheckpointError(f"{path} holds no tensors")
        for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            tensor = file.get_tensor(name)
            if tensor.numel() == 0:
                raise CheckpointError(f"{path}: {name} is empty, shape {list(tensor.shape)}")
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: {name} holds values that are not finite")
            if ".lora_B." in name or ".lora_embedding_B" in name:
                num_b += 1
                num_trained += bool(tensor.any())
    if num_b and not num_trained:
        raise CheckpointError(f"{path}: all {num_b} LoRA B matrices are still zero: nothing was trained")
