"""The flags that say what is trained; the only home of their defaults."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from finetune.utils.options import option

LORA_DROPOUT = 0.1
KINDS_OF_METHODS = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "prompt"}

# Methods of peft that need more than a training loop, by their names there.
UNSERVED = {
    "ADALORA": "AdaLoRA moves its ranks in each step by a call of its own: use LORA with rank_pattern",
    "ADAPTION_PROMPT": "the prompts of LLaMA-Adapter stand inside layers, not before a row: use PREFIX_TUNING",
    **dict.fromkeys(("CARTRIDGE", "CPT"), "this method starts from texts of its own: use PROMPT_TUNING"),
    **dict.fromkeys(("MULTITASK_PROMPT_TUNING", "POLY"), "this method needs the task of each row: use LORA"),
    "SHADOW": "this method changes what a layer returns: use LORA",
    "XLORA": "this method mixes adapters that are trained already: use LORA",
}
UNSERVED_OPTIONS = {
    "alora_invocation_tokens": "the row of a batch may hold several conversations, of which it looks at the last",
    "arrow_config": "it mixes adapters that are trained already",
    "bias": "biases are not trained",
    "kasa_config": "it changes the base, and has a loss of its own",
    "layer_replication": "the base keeps its layers",
    "monteclora_config": "it has a loss of its own",
    "use_qalora": "it adapts weights of GPTQ",
}


@dataclass(frozen=True)
class AdapterArguments:
    """What is trained: an adapter or all parameters; and how fast."""

    use_lora: bool = option(False, "train LoRA adapters, the same as `--adapter lora`")
    adapter: Literal["lora", "prefix", "prompt"] | None = option(None, "what is trained instead of all parameters")
    lora_r: int = option(8, "rank of the LoRA matrices")
    lora_alpha: float = option(16, "LoRA updates are scaled by `lora_alpha / lora_r`")
    lora_dropout: float | None = option(
        None, "dropout on the input of the LoRA matrices, 0 to 1; default: 0.1, with adapted fused experts 0"
    )
    lora_target_modules: list[str] = option(
        ["all-linear"],
        "names of the layers with LoRA, e.g. `q_proj v_proj`, one regular expression over full names, or `all-linear`: "
        "the linear layers of attention, MLPs and experts, not routers, vision towers, embeddings and head",
    )
    use_dora: bool = option(False, "DoRA: train the magnitude of each weight column, too")
    use_rslora: bool = option(False, "rsLoRA: scale by `lora_alpha / sqrt(lora_r)`")
    init_lora_weights: str = option(
        "default", "initialisation of LoRA: `default`, `gaussian`, `pissa`, `pissa_niter_16` (any number) or `olora`"
    )
    modules_to_save: list[str] = option([], "layers trained in full and saved with the adapter, e.g. `lm_head`")
    num_virtual_tokens: int = option(20, "length of a prefix or prompt adapter")
    adapter_config: str | None = option(
        None,
        "configuration of any other peft method, a JSON file such as an `adapter_config.json` or the JSON itself; "
        "instead of the flags of adapters above",
    )
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the LoRA matrices B have the learning rate times this, e.g. 16"
    )
    embedding_learning_rate: float | None = option(
        None, "learning rate of embeddings and head; default: `--learning_rate`"
    )
    freeze: list[str] = option(
        [],
        "weights to freeze where all parameters are trained: parts of names (`embed_tokens`, `layers.0-11`, "
        "`layers.4-.mlp`), kinds (`router`), or one regular expression over full names",
    )
    train_only: list[str] = option([], "weights to train, all others are frozen; named as in `--freeze`")

    def kind(self) -> str | None:
        """lora, prefix, prompt, another method of peft, or None for full-parameter training."""
        if self.adapter_config is not None:
            method = str(self.peft_options().get("peft_type"))
            return KINDS_OF_METHODS.get(method, method.lower())
        return self.adapter or ("lora" if self.use_lora else None)

    def peft_options(self) -> dict[str, Any]:
        """Return the arguments of peft's configuration as flags or file give them, with `peft_type`."""
        if self.adapter_config is not None:
            return json.loads(self.adapter_config)
        if self.adapter in ("prefix", "prompt"):
            return {"peft_type": f"{self.adapter}_tuning".upper(), "num_virtual_tokens": self.num_virtual_tokens}
        return {
            "peft_type": "LORA",
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
            "init_lora_weights": True if self.init_lora_weights == "default" else self.init_lora_weights,
            "modules_to_save": self.modules_to_save,
        }

    def unserved_options(self) -> list[str]:
        """Return a fault for each option of the method that would do nothing, or something else."""
        options = self.peft_options()
        return [
            f"--adapter_config: {name} {options[name]}: {reason}: leave it out" for name, reason in unserved(options)
        ]

    def saved_modules(self) -> tuple[str, ...] | None:
        """Names of the layers of the base that are saved with the result; None: all."""
        return None if self.kind() is None else tuple(self.peft_options().get("modules_to_save") or ())

    def virtual_tokens(self) -> int:
        """Number of virtual tokens before each conversation."""
        is_virtual = self.kind() in ("prefix", "prompt")
        return int(self.peft_options().get("num_virtual_tokens") or 0) if is_virtual else 0

    def starts_from_weights(self) -> bool:
        """Whether LoRA is computed from the base weights and moves them: PiSSA and OLoRA."""
        start = str(self.peft_options().get("init_lora_weights")) if self.kind() == "lora" else ""
        return start.startswith("pissa") or start == "olora"


def unserved(options: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the options of a method of peft that would do nothing, or something else, each with the reason."""
    given = {name for name, value in options.items() if value not in (None, "none", False)}
    return [(name, reason) for name, reason in UNSERVED_OPTIONS.items() if name in given]
