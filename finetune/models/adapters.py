"""Adapters: attach one to a model, say what is trained, write and check what was saved.

Sources: LoRA https://arxiv.org/abs/2106.09685, DoRA 2402.09353, rsLoRA 2312.03732, PiSSA 2404.02948, OLoRA 2406.01775,
prefix tuning 2101.00190, prompt tuning 2104.08691; all of them as implemented by peft.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.config.arguments import AdapterArguments
from finetune.run_dir.run_json import ADAPTER_CONFIG
from finetune.utils.errors import CheckpointError, ConfigError

ALL_LINEAR = "all-linear"
ADAPTER_FILE = "adapter_model.safetensors"


def attach_adapter(
    base: Any, adapter: AdapterArguments, *, base_revision: str | None, grows: bool, computes_initial: bool = True
) -> Any:
    """Return the base model with the adapter that the flags describe.

    Args:
        base_revision: the state of the base's repository that the saved adapter will load.
        grows: the embeddings get rows for new tokens, which must be trained too.
        computes_initial: start as --init_lora_weights says; else plain, for a model without weights.

    Raises:
        ConfigError: no such module, or an adapter that cannot train new embeddings.
    """
    kind = adapter.kind()
    if kind in ("prefix", "prompt"):
        if grows:
            raise ConfigError(f"--adapter {kind} cannot train the embeddings of new tokens: use --use_lora True")
        return attach_virtual_tokens(base, kind, adapter.num_virtual_tokens, base_revision=base_revision)
    return attach_lora(
        base,
        r=adapter.lora_r,
        alpha=adapter.lora_alpha,
        dropout=adapter.lora_dropout,
        target_modules=adapter.lora_target_modules,
        modules_to_save=adapter.modules_to_save,
        use_dora=adapter.use_dora,
        use_rslora=adapter.use_rslora,
        init_lora_weights=adapter.init_lora_weights if computes_initial else "default",
        train_embeddings=grows,
        base_revision=base_revision,
    )


def attach_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    modules_to_save: Sequence[str] = (),
    use_dora: bool = False,
    use_rslora: bool = False,
    init_lora_weights: str = "default",
    train_embeddings: bool = False,
    base_revision: str | None = None,
) -> Any:
    """LoRA matrices on `target_modules`, everything else frozen; returns the `PeftModel`.

    Args:
        target_modules: names of layers, or `all-linear` for every linear layer but the head.
        train_embeddings: also train and save the embeddings and the head (new tokens start untrained).
        base_revision: the state of the base's repository that the saved adapter will load.

    Raises:
        ConfigError: a name that matches no layer, or an option that peft refuses.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    whole = list(modules_to_save)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if train_embeddings:
        whole += [name for name in embedding_names(model, tied) if name not in whole]
    try:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides it by r
            lora_dropout=dropout,
            target_modules=ALL_LINEAR if list(target_modules) == [ALL_LINEAR] else list(target_modules),
            modules_to_save=whole or None,
            use_dora=use_dora,
            use_rslora=use_rslora,
            init_lora_weights=True if init_lora_weights == "default" else init_lora_weights,  # type: ignore[arg-type]
            ensure_weight_tying=tied and bool(whole),
            task_type=TaskType.CAUSAL_LM,
        )
        # In the base's precision, as DeepSpeed makes them under ZeRO-1 and 2 anyway; it keeps float32 masters itself.
        # By default peft makes them float32, which ZeRO-3 leaves so: the stages would compute different numbers.
        return get_peft_model(model, config, autocast_adapter_dtype=False, revision=base_revision)
    except ValueError as error:
        raise ConfigError(f"LoRA cannot be attached: {error}") from None


def attach_virtual_tokens(model: Any, kind: str, num_virtual_tokens: int, *, base_revision: str | None = None) -> Any:
    """Prefix tuning (`kind` prefix) or prompt tuning (`kind` prompt); returns the `PeftModel`."""
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    config_class = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}[kind]
    config = config_class(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
    return get_peft_model(model, config, revision=base_revision)


def embedding_names(model: Any, tied: bool) -> list[str]:
    """The last part of the module names of the input embeddings and, unless tied to them, of the head."""
    wanted = [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()])
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return [names[id(module)] for module in wanted if module is not None]


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters; right under ZeRO-3 too, where a parameter's own size is that of a share."""
    counts = [
        (parameter.requires_grad, getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters()
    ]
    return sum(size for trainable, size in counts if trainable), sum(size for _, size in counts)


def changes_base_weights(init_lora_weights: str) -> bool:
    """Whether this initialisation takes the adapter's first product out of the base weights: PiSSA and OLoRA do."""
    return init_lora_weights.startswith("pissa") or init_lora_weights == "olora"


class InitialLora:
    """The LoRA matrices as PiSSA or OLoRA set them, kept to save what was learned as a plain LoRA on the original base.

    Both move s·B0·A0 out of the base weight W into the adapter and trains from there, so the tuned layer computes
    W - s·B0·A0 + s·B·A. On the untouched W that is a LoRA of rank 2r: [B, -B0]·[A; A0], with the same scale s.
    """

    def __init__(self, model: Any) -> None:
        with _gathered(model):
            state = {name: one.detach().cpu().clone() for name, one in model.named_parameters() if ".lora_" in name}
        self.tensors = {name.replace(".default.", "."): tensor for name, tensor in state.items()}

    def rewrite(self, folder: Path) -> None:
        """Replace a just saved adapter by its plain form of rank 2r."""
        import torch
        from safetensors.torch import load_file, save_file

        saved = load_file(folder / ADAPTER_FILE)
        for name in [name for name in saved if ".lora_A." in name or ".lora_B." in name]:
            first = self.tensors[name].to(saved[name].dtype)
            if ".lora_A." in name:
                saved[name] = torch.cat([saved[name], first], dim=0).contiguous()
            else:
                saved[name] = torch.cat([saved[name], -first], dim=1).contiguous()
        save_file(saved, folder / ADAPTER_FILE, metadata={"format": "pt"})
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        # alpha / r must stay, or alpha / sqrt(r) with rsLoRA.
        config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
        config.update(r=config["r"] * 2, init_lora_weights=True)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def _gathered(model: Any) -> Iterator[None]:
    """Whole trainable parameters on every rank inside the block; does nothing unless they are partitioned (ZeRO-3)."""
    parameters = [one for one in model.parameters() if one.requires_grad and hasattr(one, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def gather_virtual_tokens(model: Any, *, saves: bool) -> Iterator[None]:
    """Inside the block a prefix or prompt adapter can be saved by those ranks that do (`saves`).

    peft computes what it saves by running the prompt encoder. Under ZeRO-3 its weights are partitioned, and a rank
    that runs it alone waits for ever for the shares of the others. The others run it too: DeepSpeed remembers in which
    order modules run, and ranks that remember different orders wait for each other in the next step.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        yield
        return
    with _gathered(model):
        if not saves:
            model.get_prompt_embedding_to_save(model.active_adapter)
        yield


def check_saved_adapter(folder: Path) -> None:
    """Open a saved adapter again and check that something was learned and all of it was written.

    Raises:
        CheckpointError: no file, an empty tensor (what ZeRO-3 leaves of a parameter that nobody gathered), a value
            that is not finite, or LoRA B matrices that are all still zero.
    """
    import torch
    from safetensors import safe_open

    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} was not written")
    b_matrices = moved = 0
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
                b_matrices += 1
                moved += bool(tensor.any())
    if b_matrices and not moved:
        raise CheckpointError(f"{path}: all {b_matrices} LoRA B matrices are still zero: the run learned nothing")
