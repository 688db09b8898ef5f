"""A result in memory, beside the model that it was trained from, ready to answer or to be measured."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetune.chat_templates import ChatFormat, end_token_ids, select_chat_format
from finetune.inference.run_result import RunResult
from finetune.models import loader
from finetune.run_dir.run_json import is_adapter
from finetune.utils.errors import CheckpointError, ConfigError, first_line

TUNED, BASE = "tuned", "base"  # the two models of a result
MEMORY_FRACTION = 0.8  # of the free memory, for weights
# Of a repository on the hub, which may hold the same weights several times over, in folders of their own too.
BESIDE_WEIGHTS = ("*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICEN[SC]E*", "NOTICE*",
                  "USE_POLICY*")  # fmt: skip


@dataclass
class LoadedModel:
    """A loaded result.

    Attributes:
        tuned: the trained model in evaluation mode; an adapter on its base.
        chat_format: the one it was trained in.
        stop_token_ids: behind which an answer is over: the trained one first.
    """

    result: RunResult
    tuned: Any
    tokenizer: Any
    chat_format: ChatFormat
    base_name: str | None = None
    _base: Any = None

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an answer: the token that training taught, any other that ends model turns, the model's own."""
        own = getattr(self.tuned.generation_config, "eos_token_id", None)
        own = [] if own is None else [own] if isinstance(own, int) else list(own)
        taught = self.result.chat["stop_token_id"]
        return list(dict.fromkeys([*([] if taught is None else [taught]), *end_token_ids(self.chat_format), *own]))

    @contextmanager
    def base(self) -> Iterator[Any]:
        """The model as it was before the training, inside the block.

        An adapter is switched off; beside a full model the base is loaded the first time, and stays.

        Raises:
            ConfigError: the base is not there any more.
            CheckpointError: what is there is another model.
        """
        if self.result.adapter is not None and self._base is None:
            with self.tuned.disable_adapter():
                yield self.tuned
            return
        if self._base is None:
            self._base = load_base(self.result, self.tokenizer, name=self.base_name)
        yield self._base


def load_for_inference(result: RunResult, *, base_name: str | None = None, only_base: bool = False) -> LoadedModel:
    """Load a result: on the GPUs there are, spread over several where one is too small, else on the CPU.

    Args:
        base_name: where the base lies now, unless where it was.
        only_base: the trained weights are not wanted: the base stands in their place.

    Raises:
        ConfigError: the base of an adapter is not there any more.
        CheckpointError: what is there is another model, or the adapter does not fit.
    """
    tokenizer = load_tokenizer(result)
    if only_base:
        base = load_base(result, tokenizer, name=base_name)
        return LoadedModel(result, base, tokenizer, chat_format_of(result, tokenizer), base_name, base)
    if result.adapter is None:
        tuned = _load(result.folder, result)
    else:
        tuned = load_saved_adapter(load_base(result, tokenizer, name=base_name), result.folder)
    return LoadedModel(result, tuned.eval(), tokenizer, chat_format_of(result, tokenizer), base_name)


def read_model(folder: Path, *, markers: dict[str, list[int]], trust_remote_code: bool) -> RunResult:
    """A folder with a model that no run of ours has left there, as a result without a base.

    Args:
        markers: `human_token_ids` and `model_token_ids`, in case that it is LingoWhale.

    Raises:
        ConfigError: it holds no model, or nothing in it says how its conversations are written.
    """
    if is_adapter(folder):
        raise ConfigError(f"{folder}: an adapter without run.json: its base and chat format are not known")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = loader.load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder}: this model comes with Python files of its own; when you trust them, give "
                "--trust_remote_code"
            ) from None
        raise ConfigError(f"{folder}: holds neither run.json nor a model: {first_line(error)}") from None
    is_lingowhale = "lingowhale" in (config.model_type or "").lower()
    if tokenizer.chat_template is None and not is_lingowhale:
        raise ConfigError(
            f"{folder}: neither run.json nor a chat template of its tokenizer says how its conversations are written"
        )
    name = "the tokenizer's own chat template" if tokenizer.chat_template else "lingowhale"
    run = {
        "model": {"name": str(folder), "folder": str(folder.absolute()), "trusts_code": trust_remote_code},
        "chat": {"format": name, **markers, "content_tokens": [], "stop_token_id": None},
        "precision": {"bfloat16": "bf16", "float16": "fp16"}.get(str(config.dtype).rpartition(".")[2], "float32"),
    }
    return RunResult(folder, run, None, is_trained=False)


def load_tokenizer(result: RunResult) -> Any:
    """The tokenizer as it was saved with the result, new tokens and chat template included."""
    return loader.load_tokenizer(str(result.folder), trust_remote_code=result.trusts_code)


def chat_format_of(result: RunResult, tokenizer: Any) -> ChatFormat:
    """The format that the result was trained in; a template lies in its tokenizer."""
    chat = result.chat
    found, _ = select_chat_format(
        tokenizer,
        "lingowhale" if chat["format"] == "lingowhale" else None,
        human_token_ids=chat["human_token_ids"],
        model_token_ids=chat["model_token_ids"],
        content_tokens=chat["content_tokens"],
    )
    return found


def base_folder(result: RunResult, name: str | None = None) -> Path:
    """The folder of the base, its weights known to be those that the training began with.

    Of a base on the hub it is the one in the cache; what is not there yet is downloaded.

    Args:
        name: where the base lies now, unless where it was.

    Raises:
        ConfigError: there is none.
        CheckpointError: it is not whole, or another model.
    """
    was = result.base["folder"] or result.base["name"]
    found = Path(name or was).expanduser()
    if not found.is_dir():
        if name or result.base["folder"]:
            raise ConfigError(
                f"{result.folder}: its base {found} is not there: name the folder it lies in with --base_model"
            )
        found = _from_hub(result)
    weights = loader.weights_fingerprint(str(found))
    if weights is None:
        raise CheckpointError(
            f"{result.folder}: its base {found} holds no weights, or not all: name its folder with --base_model"
        )
    if weights != result.base["weights"]:
        raise CheckpointError(
            f"{result.folder}: was trained on {was}, and {found} holds other weights (fingerprint {weights[:12]}, "
            f"expected {str(result.base['weights'])[:12]}): name the right one with --base_model"
        )
    return found


def _from_hub(result: RunResult) -> Path:
    """The base in the hub's cache: config, tokenizer, code and the weights in one format, and nothing else of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, revision = result.base["name"], result.base["revision"]
    folder = loader.local_model_dir(name, revision)
    for weights in loader.WEIGHTS_FILES:
        if loader.weights_fingerprint(str(folder)) is None:
            stem, suffix = weights.split(".")
            try:
                folder = Path(
                    snapshot_download(name, revision=revision, allow_patterns=[*BESIDE_WEIGHTS, f"{stem}*.{suffix}"])
                )
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                raise ConfigError(f"{result.folder}: its base {name} cannot be had: {first_line(error)}") from None
    return folder


def load_base(result: RunResult, tokenizer: Any, *, name: str | None = None) -> Any:
    """The model that was trained, as it was before; its vocabulary large enough for the result's tokenizer.

    Raises:
        ConfigError: it is not there any more.
        CheckpointError: what is there is another model, or does not load.
    """
    base = _load(base_folder(result, name), result)
    if loader.embedding_rows(tokenizer) > base.config.get_text_config().vocab_size:
        base.resize_token_embeddings(loader.embedding_rows(tokenizer))
    return base.eval()


def load_saved_adapter(base: Any, folder: Path) -> Any:
    """A saved adapter on its base.

    Raises:
        CheckpointError: it was made for a model of another shape.
    """
    from peft import PeftModel

    # Of adapters on one side of tied embeddings, which run as they are; of names that peft itself writes for experts.
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True. and a tied layer is part of the adapter")
    warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match any targeted module")
    try:
        return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{folder}: the adapter does not fit its base: {lines[min(1, len(lines) - 1)]}") from None


def _load(folder: Path, result: RunResult) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    trained = loader.torch_dtype(result.precision)
    options: dict[str, Any] = {"device_map": _device_map()} if on_gpu else {}
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=trained if on_gpu else _dtype_on_cpu(folder),
            trust_remote_code=result.trusts_code,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights do not load: {first_line(error)}") from None


def _device_map() -> Any:
    """This rank's GPU; for a process that is alone, as many GPUs as the model needs."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return "auto" if alone else {"": int(os.environ.get("LOCAL_RANK", "0"))}


def _dtype_on_cpu(folder: Path) -> Any:
    """float32, which a CPU is fastest in, unless the weights would not fit; then as they are stored."""
    import torch

    stored = loader.stored_bytes(folder) or 0
    return torch.float32 if 2 * stored <= MEMORY_FRACTION * free_memory() else "auto"


def load_strict(folder: Path, dtype: Any, *, trusts_code: bool) -> Any:
    """The model in a folder, opened by plain transformers, which must find each weight and no other.

    Raises:
        CheckpointError: weights are missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trusts_code, output_loading_info=True
    )
    model, info = loaded
    wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults = [f"{len(keys)} {name.replace('_', ' ')}, the first {keys[0]}" for name, keys in wrong.items() if keys]
    if faults:
        raise CheckpointError(f"{folder}: the saved model is not whole: {'; '.join(faults)}")
    return model.eval()


def free_memory() -> int:
    """Bytes that the system would give without swapping."""
    import psutil

    return psutil.virtual_memory().available
