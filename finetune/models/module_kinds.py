"""Kinds of modules, told from the module tree: attention, dense MLP, routed experts, router, vision and the like.

The nearest module around a weight that one of the rules knows decides, by its name or by that of its class:

    model.layers.3.mlp.experts.gate_up_proj       routed experts
    model.layers.3.mlp.shared_expert.up_proj      shared experts
    model.layers.3.mlp.gate                       router
    model.visual.blocks.0.attn.qkv                vision: it is outside of the language model
"""

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

ATTENTION, LINEAR_ATTENTION, DENSE_MLP = "attention", "linear attention and state space", "dense MLP"
ROUTED_EXPERTS, SHARED_EXPERTS, ROUTER = "routed experts", "shared experts", "router"
EMBEDDINGS, HEAD, VISION, MTP, OTHERS = "embeddings", "head", "vision and audio", "multi-token prediction", "others"
KINDS = (ATTENTION, LINEAR_ATTENTION, DENSE_MLP, ROUTED_EXPERTS, SHARED_EXPERTS, ROUTER, EMBEDDINGS, HEAD, VISION, MTP,
         OTHERS)  # fmt: skip
# Kind, names of modules, and names of classes without that of the model. The rules of the first group hold for whatever
# is inside of such a module; of the others the innermost module decides.
PARTS = (
    (ROUTER, r"\w*router\w*|indexer|scorer|shared_experts?_gate|(moe|expert)_gate", "Router$|Gating$"),
    (SHARED_EXPERTS, r"shared_(experts?|mlp|moe)\w*", "^$"),
    (ROUTED_EXPERTS, r"(local_|mlp_)?experts", "Experts?$"),
)
BLOCKS = (
    (
        LINEAR_ATTENTION,
        r"linear_attn|mamba\w*|ssm|mlstm\w*|recurrent\w*|temporal_block|short_?conv|conv",
        "Mamba|DeltaNet|DeltaAttention|Recurrent|RgLru|ShortConv|LinearAttention|LightningAttention|LSTM|^Mixer",
    ),
    (DENSE_MLP, r"mlp\w*|feed_?forward\w*|ffn?|fc_?(1|2|in|out)|intermediate|DenseReluDense", "MLP|Mlp|FeedForward"),
    (ATTENTION, r"\w*(attn|attention)\w*|mixer", "Attention|Attn"),
)
OF_IMAGES = re.compile("^(vision|visual|image|audio)")
MTP_NAME = re.compile(r"^(mtp|nextn|eh_proj)(_|$)|_mtp$")
# Parts of names that peft adds.
OF_PEFT = re.compile(
    r"^base_model\.(model\.)?|\.(base_layer|original_module)(?=\.|$)"
    r"|\.(lora_\w+|modules_to_save|token_adapter|trainable_tokens_delta)(\.default)?(?=\.|$)"
)


@dataclass
class KindCount:
    """Parameters of one kind, those of an adapter with the layers that they adapt."""

    trained: int = 0
    frozen: int = 0

    @property
    def state(self) -> str:
        """trained, frozen or absent."""
        return "trained" if self.trained else "frozen" if self.frozen else "absent"

    def facts(self) -> dict[str, int | str]:
        """Return it as plain values."""
        return {"state": self.state, "trained": self.trained, "frozen": self.frozen}


@dataclass
class ModuleKinds:
    """The kind of each module of a model without an adapter, by its full name; see `module_kinds`.

    Attributes:
        untrained: Names of parameters that the model's code keeps from training: built frozen, as the biases that
            balance experts, or in an indexer, whose choice of tokens has no gradient.
    """

    by_module: dict[str, str] = field(default_factory=dict)
    untrained: frozenset[str] = frozenset()

    def of(self, name: str) -> str:
        """Return the kind of a module or parameter, also of one that peft wraps."""
        inner = OF_PEFT.sub("", name)
        for path in (inner, f"model.{inner}"):  # around virtual tokens peft names the model itself base_model
            while path:
                if path in self.by_module:
                    return self.by_module[path]
                path = path.rpartition(".")[0]
        return OTHERS

    def count(self, model: Any) -> dict[str, KindCount]:
        """Count the parameters of a model by kind, as a whole where they are partitioned or packed; tied ones once."""
        counts = {kind: KindCount() for kind in KINDS}
        for name, parameter in model.named_parameters():
            count, size = counts[self.of(name)], math.prod(full_shape(parameter))
            if parameter.requires_grad:
                count.trained += size
            else:
                count.frozen += size
        return counts

    def read_past(self, base: Any) -> list[str]:
        """Return the modules whose weight the code around them uses without calling them.

        State-space mixers hand it to a kernel, Gemma 3n clamps it. It would not see an adapter, nor packed values.
        """
        classes: dict[str, Any] = {name: type(module) for name, module in base.named_modules()}
        split = [name.rpartition(".") for name, kind in self.by_module.items() if kind in (LINEAR_ATTENTION, OTHERS)]
        return [f"{outer}.{part}" for outer, _, part in split if part in _read_weights(classes[outer])]


@cache
def _read_weights(outer: Any) -> set[str]:
    code = inspect.getsource(outer)
    return set(re.findall(r"self\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size|ndim))", code))


def full_shape(parameter: Any) -> Any:
    """Return the shape of a parameter as a whole, also of one that is packed (4 bits) or partitioned (ZeRO-3)."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape


def module_kinds(base: Any) -> ModuleKinds:
    """Return the kinds of the modules of a model without an adapter that have parameters of their own."""
    modules = dict(base.named_modules())
    language = language_model(base)
    head, embeddings = output_embeddings(base), base.get_input_embeddings()
    inside = {id(module) for module in language.modules()} if language is not None else None
    prefix = re.split("For[A-Z]|Model|LMHead", type(base).__name__)[0]
    kinds = {}
    for name, module in modules.items():
        if next(module.parameters(recurse=False), None) is None:
            continue
        path = list(_path(name, modules))
        if module is head:
            kinds[name] = HEAD
        elif module is embeddings:
            kinds[name] = EMBEDDINGS
        elif any(OF_IMAGES.match(part) for part, _, _ in path) or (
            inside is not None
            and (id(module) not in inside or any("CrossAttention" in type(outer).__name__ for _, outer, _ in path))
        ):
            kinds[name] = VISION
        elif any(MTP_NAME.search(part) for part in name.split(".")):
            kinds[name] = MTP
        else:
            kinds[name] = _kind_in_text(name, path, prefix)
    untrained = {name for name, parameter in base.named_parameters() if not parameter.requires_grad or in_indexer(name)}
    return ModuleKinds(kinds, frozenset(untrained))


def in_indexer(name: str) -> bool:
    """Whether a module or parameter is part of an indexer, which chooses tokens of sparse attention."""
    return "indexer" in name.split(".")


def language_model(base: Any) -> Any | None:
    """Return the part of a model of several modalities that reads text; None for a model of text alone."""
    if base.config.get_text_config() is base.config:
        return None
    decoder = base.get_decoder()
    return None if decoder is None or decoder is base else decoder


def _path(name: str, modules: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (last part of the name, module, its parent) from a module outwards, without the model itself."""
    while name:
        outer, _, part = name.rpartition(".")
        yield part, modules[name], modules[outer]
        name = outer


def _kind_in_text(name: str, path: list[tuple[str, Any, Any]], prefix: str) -> str:
    import torch

    if isinstance(path[0][1], torch.nn.Embedding):
        return EMBEDDINGS
    parts = []
    for part, module, parent in path:
        class_name = type(module).__name__.removeprefix(prefix).removeprefix("Text")
        if part == "gate" and any(child in ("experts", "local_experts") for child, _ in parent.named_children()):
            return ROUTER
        if part.isdigit() and re.search("Layer$|Block$", class_name):
            break
        if "norm" not in part:  # post_attention_layernorm is not attention
            parts.append((part, class_name))
    candidates = [(rule, part) for rule in PARTS for part in parts] + [
        (rule, part) for part in parts for rule in BLOCKS
    ]
    for (kind, names, classes), (part, class_name) in candidates:
        if re.fullmatch(names, part) or re.search(classes, class_name):
            return kind
    return EMBEDDINGS if "embed" in name else OTHERS


def unwrap_adapter(model: Any) -> Any:
    """Return the model itself, without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_embeddings(model: Any) -> Any:
    """Return the head; of a model of several modalities it may be that of the language model in it (Nemotron Omni)."""
    base = unwrap_adapter(model)
    head, language = base.get_output_embeddings(), language_model(base)
    return language.get_output_embeddings() if head is None and language is not None else head


def loss_module(model: Any) -> Any:
    """Return the module that computes logits of hidden states; of one that is trained as a copy, the copy."""
    module: Any = output_embeddings(model)
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies[module.active_adapter]
