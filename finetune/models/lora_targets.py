"""Which layers and expert weights LoRA is attached to, resolved from the module tree, and how peft is told.

peft itself takes `all-linear` for every linear layer, so that routers, vision towers and layers whose weight the code
reads past the adapter get one, and experts that are one parameter for all (`target_parameters`) do not.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from finetune.models.model_folder import MOST_PARTS
from finetune.models.module_kinds import (
    EMBEDDINGS,
    HEAD,
    KINDS,
    MTP,
    ROUTED_EXPERTS,
    ROUTER,
    SHARED_EXPERTS,
    VISION,
    ModuleKinds,
    in_indexer,
    module_kinds,
)
from finetune.utils.errors import ConfigError, format_names
from finetune.utils.options import source_folder

ALL_LINEAR = "all-linear"
NOT_IN_ALL_LINEAR = (ROUTER, EMBEDDINGS, HEAD, VISION, MTP)
# Names of the layers of experts in models before transformers 5, where each expert was a module, by those of today.
FUSED_NAMES = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("w2",)}


@dataclass(frozen=True)
class LoraTargets:
    """Full names of the linear layers, and of the parameters that peft wraps where they are."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]

    def options(self, model: Any) -> dict[str, Any]:
        """Return the arguments of `LoraConfig` that select just these, in few words."""
        modules = [name for name, _ in model.named_modules()]
        suffixes = _suffixes(self.modules, modules)
        others = [name for name in _matched(suffixes, modules) if name not in set(self.modules)]
        parameters = [name for name, _ in model.named_parameters()]
        return {
            "target_modules": suffixes,
            "exclude_modules": _expression(others, self.modules),
            "fan_in_fan_out": any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in self.modules),
            "target_parameters": _exact_suffixes(self.parameters, parameters) or None,
        }


def resolve_targets(base: Any, wanted: str | Sequence[str]) -> LoraTargets:
    """Find what `--lora_target_modules` means in a model without an adapter; vision towers are never adapted.

    Args:
        wanted: `all-linear`, a regular expression over full names, or the last parts of names.

    Raises:
        ConfigError: nothing, or no layer that can be adapted, has such a name; the right names are listed.
    """
    kinds = module_kinds(base)
    modules, parameters = _candidates(base, kinds)
    unfit = _unfit(base, kinds, modules, parameters)
    if wanted == ALL_LINEAR:
        chosen = LoraTargets(
            tuple(name for name in modules if kinds.of(name) not in NOT_IN_ALL_LINEAR and name not in unfit),
            tuple(name for name in parameters if name not in unfit),
        )
        if not (chosen.modules or chosen.parameters):
            reasons = "; ".join(dict.fromkeys(unfit.values())) or "it has none that training adapts"
            raise ConfigError(
                f"an adapter cannot be attached to any layer of {type(base).__name__}: {reasons}: train it in full "
                "(--use_lora False)"
            )
    else:
        chosen = _by_name(wanted, modules, parameters, kinds, base)
        if refused := [name for name in (*chosen.modules, *chosen.parameters) if name in unfit]:
            raise ConfigError(
                f"LoRA cannot be attached to {format_names(_last_parts(refused))} of {type(base).__name__}: "
                f"{unfit[refused[0]]}: its {_known(base, kinds)}"
            )
    wrapped = _renamed_by_peft(base, chosen.modules)
    classes: dict[str, Any] = {name: type(base.get_submodule(name)) for name in chosen.modules}
    wrapped |= {name for name, layer in classes.items() if _is_block_diagonal(layer)}
    return replace(
        chosen,
        modules=tuple(name for name in chosen.modules if name not in wrapped),
        parameters=(*chosen.parameters, *(f"{name}.weight" for name in chosen.modules if name in wrapped)),
    )


def parse_target_modules(given: Sequence[str]) -> str | list[str]:
    """Return what peft takes: names, also where commas separate them, `all-linear`, or one regular expression.

    >>> parse_target_modules(["q_proj,v_proj"])
    ['q_proj', 'v_proj']
    >>> parse_target_modules([r".*layers\\.[0-3]\\..*_proj"])
    '.*layers\\\\.[0-3]\\\\..*_proj'
    """
    if len(given) == 1 and not re.fullmatch(r"[\w.,\uff0c\u3001\s]*", given[0]):  # all-linear is such a string, too
        return given[0]
    return [name for value in given for name in re.split(r"[,\uff0c\u3001\s]+", value) if name]


def check_target_names(given: Sequence[str], model_config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Check names of `--lora_target_modules` before the model is built, which takes seconds.

    A name is refused that is no word of the model's code in transformers, nor of the names of its stored tensors.

    Raises:
        ConfigError: naming the linear layers of that code.
    """
    wanted, kind = parse_target_modules(given), str(model_config.get("model_type")).replace("-", "_")
    file = source_folder("transformers") / "models" / kind / f"modeling_{kind}.py"
    if isinstance(wanted, str) or model_config.get("auto_map") or not file.is_file():
        return
    code = file.read_text(encoding="utf-8")
    if re.search(r"^from \.\.(auto|\w+\.modeling)", code, re.MULTILINE):  # layers of another model's code
        return
    known = {*re.findall(r"\w+", code), *(part for name in tensors for part in name.split("."))}
    known.update(*FUSED_NAMES.values(), map(str, range(MOST_PARTS)))
    if unknown := [name for name in wanted if not known.issuperset(name.split("."))]:
        layers = sorted(set(re.findall(r"self\.(\w+) = (?:nn\.Linear|Conv1D)\(", code)) - {"lm_head"})
        raise ConfigError(
            f"--lora_target_modules {' '.join(unknown)}: {kind} has no such layer: expected all-linear, or some of "
            f"{', '.join(layers)}"
        )


def named_modules(base: Any, wanted: Sequence[str]) -> list[str]:
    """Return names by which peft finds the layers of `--modules_to_save` alone: it compares ends of names as texts.

    Raises:
        ConfigError: there is no such layer.
    """
    names = [name for name, _ in base.named_modules()]
    layers = {name: _matched([name], names) for name in wanted}
    if unknown := [name for name in wanted if not layers[name]]:
        raise ConfigError(
            f"LoRA cannot be attached: the model has no layer {', '.join(unknown)} (--modules_to_save): its "
            f"{linear_names(base)}"
        )
    is_exact = {name: sum(full.endswith(name) for full in names) == len(layers[name]) for name in wanted}
    return [part for name in wanted for part in ([name] if is_exact[name] else _exact_suffixes(layers[name], names))]


def linear_names(base: Any) -> str:
    """Return the last parts of the names of what LoRA can be attached to, by kind."""
    return _known(base, module_kinds(base))


def _known(base: Any, kinds: ModuleKinds) -> str:
    modules, parameters = _candidates(base, kinds)
    unfit = _unfit(base, kinds, modules, parameters)
    by_kind: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name in (*modules, *parameters):
        if name not in unfit:
            by_kind[kinds.of(name)].add(name.rpartition(".")[2] if name in modules else ".".join(name.split(".")[-2:]))
    return "layers are " + "; ".join(f"{', '.join(sorted(names))} ({kind})" for kind, names in by_kind.items() if names)


def _candidates(base: Any, kinds: ModuleKinds) -> tuple[list[str], list[str]]:
    """Return the linear layers that are trained, and the parameters that hold the weights of all experts of a layer."""
    import torch
    from transformers.pytorch_utils import Conv1D

    modules, parameters = [], []
    for name, module in base.named_modules():
        kind = kinds.of(name)
        if kind == VISION or in_indexer(name):
            continue
        if isinstance(module, torch.nn.Linear | Conv1D):
            modules.append(name)
        elif kind in (ROUTED_EXPERTS, SHARED_EXPERTS):
            outer, _, leaf = name.rpartition(".")
            around: Any = type(base.get_submodule(outer))
            for part, weight in module.named_parameters(recurse=False):
                dimensions = len(getattr(weight, "ds_shape", weight.shape))  # partitioned ones (ZeRO-3) are flat
                is_read = _reads(around, leaf, part)  # past the wrapper (DBRX)
                parameters += [f"{name}.{part}"] * (dimensions in (2, 3) and "bias" not in part and not is_read)
    return modules, parameters


@cache
def _reads(outer: Any, leaf: str, part: str) -> bool:
    """Whether the code of a module reads a parameter of one inside it."""
    return re.search(rf"self\.{leaf}\.{part}\b", inspect.getsource(outer)) is not None


@cache
def _is_block_diagonal(layer: Any) -> bool:
    """Whether a linear layer multiplies blocks of its weight (DeepSeek-V4's outputs), which LoRA can only add to."""
    return "self.weight.view(" in inspect.getsource(layer.forward)


def _by_name(
    wanted: str | Sequence[str], modules: list[str], parameters: list[str], kinds: ModuleKinds, base: Any
) -> LoraTargets:
    import torch

    if isinstance(wanted, str):
        try:
            expression = re.compile(wanted)
        except re.error as error:
            raise ConfigError(f"--lora_target_modules {wanted}: {error}: its {_known(base, kinds)}") from None
        chosen = LoraTargets(tuple(filter(expression.fullmatch, modules)),
                             tuple(filter(expression.fullmatch, parameters)))  # fmt: skip
        unknown = [] if chosen.modules or chosen.parameters else [wanted]
    else:
        chosen, unknown = LoraTargets((), ()), []
        others = [
            name
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Embedding | torch.nn.Conv1d) and kinds.of(name) != VISION
        ]
        for name in wanted:
            layers = _matched([name], [*modules, *others])
            fused = [full for full in parameters
                     if _matched([name], [full]) or name in FUSED_NAMES.get(full.rpartition(".")[2], ())]  # fmt: skip
            if not layers and not fused:
                unknown.append(name)
            chosen = LoraTargets((*chosen.modules, *layers), (*chosen.parameters, *fused))
    if unknown:
        raise ConfigError(
            f"LoRA cannot be attached: the model has no layer {', '.join(unknown)} (--lora_target_modules): its "
            f"{_known(base, kinds)}"
        )
    return LoraTargets(tuple(dict.fromkeys(chosen.modules)), tuple(dict.fromkeys(chosen.parameters)))


def text_layers(base: Any, options: dict[str, Any]) -> dict[str, list[str]]:
    """Return `all-linear` resolved, or the full names of layers outside a vision tower where names fit some in it."""
    if options.get("target_modules") == ALL_LINEAR:
        return {"target_modules": list(resolve_targets(base, ALL_LINEAR).modules)}
    kinds, found, of_images = module_kinds(base), {}, False
    for key in ("target_modules", "feedforward_modules"):
        if not isinstance(wanted := options.get(key), str | None) and not options.get("layers_to_transform"):
            layers = [name for name, _ in base.named_modules() if name in wanted or _matched(wanted, [name])]
            found[key] = [name for name in layers if kinds.of(name) != VISION]
            of_images |= len(found[key]) < len(layers)
    return found if of_images and all(found.values()) else {}


def _renamed_by_peft(base: Any, modules: Sequence[str]) -> set[str]:
    """Return the layers that peft would take for experts, as adapters made with transformers 4 name them.

    Their weights are wrapped as parameters, under the same names in the adapter (peft 0.21, `target_parameters`).
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    renamed = set()
    for leaf in {name.rpartition(".")[2] for name in modules}:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, base, None)
            is_kept = leaf in (config.target_modules or ())
        except ValueError:  # one of two layers that would be fused
            is_kept = False
        if not is_kept:
            renamed |= {name for name in modules if name.rpartition(".")[2] == leaf}
    return renamed


def _unfit(base: Any, kinds: ModuleKinds, modules: Sequence[str], parameters: Sequence[str]) -> dict[str, str]:
    """Return the linear layers, and parameters of experts, that LoRA cannot be attached to, each with the reason.

    peft renames tensors of an adapter by the rules that transformers has for the files of the base. In those of
    Inkling 2 the weight of `k_sconv.weight_proj` is called so itself, in those of Mistral Large 4 `mlp.experts` is
    `experts`: peft would not find its LoRA again.
    """
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    places = {name: name for name in modules} | {name: name.rpartition(".")[0] for name in parameters}
    keys = {name: f"base_model.model.{place}.lora_A.weight" for name, place in places.items()}
    saved = {key: torch.empty(1, 1) for key in keys.values()}
    loaded = convert_peft_adapter_state_dict_for_transformers(base, LoraConfig(), saved)
    renamed = [name for name, key in keys.items() if key not in loaded]
    return {
        **dict.fromkeys(renamed, "peft renames the adapter when it loads it"),
        **dict.fromkeys(kinds.read_past(base), "the code reads the weight past an adapter"),
    }


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _matched(suffixes: Iterable[str], names: Iterable[str]) -> list[str]:
    ends = tuple(f".{suffix}" for suffix in suffixes)
    return [name for name in names if f".{name}".endswith(ends)] if ends else []


def _suffixes(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return last parts of names that match all of `chosen`, and few others."""
    wanted, suffixes = set(chosen), []
    for leaf in _last_parts(chosen):
        if set(_matched([leaf], names)) <= wanted:
            suffixes.append(leaf)
        else:
            suffixes += sorted({".".join(name.split(".")[-2:]) for name in chosen if name.rpartition(".")[2] == leaf})
    return suffixes


def _exact_suffixes(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the shortest ends of names that match `chosen` and nothing else."""
    left, suffixes = list(chosen), []
    while left:
        parts = left[0].split(".")
        ends = (".".join(parts[-count:]) for count in range(2, len(parts) + 1))
        suffix = next(end for end in ends if set(_matched([end], names)) <= set(chosen))
        suffixes.append(suffix)
        matched = set(_matched([suffix], left))
        left = [name for name in left if name not in matched]
    return sorted(suffixes)


def _expression(names: Sequence[str], others: Sequence[str]) -> str | list[str] | None:
    """Return a regular expression for these names in any layer, or the names where it would match others, too."""
    patterns = sorted({re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name)) for name in names})
    expression = "|".join(patterns)
    if any(re.fullmatch(expression, name) for name in others):
        return list(names)
    return expression or None
