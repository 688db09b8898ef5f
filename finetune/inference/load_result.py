"""Load a result, and the model it was trained from, for inference and evaluation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from finetune.chat_templates import ChatFormat, end_token_ids, select_chat_format
from finetune.config.arguments import needs_no_trust
from finetune.config.optional_packages import check_installed
from finetune.conversation import DEFAULT_SETTINGS, ChatSettings
from finetune.inference.run_result import RunResult
from finetune.models import loader
from finetune.models.auto_class import auto_class, empty_model
from finetune.models.base_checks import check_weights
from finetune.models.model_folder import WEIGHTS_FILES, local_model_dir, stored_bytes, weights_fingerprint
from finetune.models.quantization import quantized_loading
from finetune.run_dir.run_json import is_adapter
from finetune.utils.console import log_notes
from finetune.utils.errors import CheckpointError, ConfigError, first_line, lines_of
from finetune.utils.hub import hub_errors
from finetune.utils.options import fill

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TUNED, BASE = "tuned", "base"  # the two models of a result
MEMORY_FRACTION = 0.8  # of the free memory that weights may take
# Files besides the weights to download from the hub. A repository may hold the weights in several formats, also in
# subfolders.
OTHER_MODEL_FILES = ("*.json", "*.py", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICEN[SC]E*", "NOTICE*",
                     "USE_POLICY*")  # fmt: skip


@dataclass
class LoadedModel:
    """A loaded result."""

    result: RunResult
    tuned: Any  # the trained model in evaluation mode; an adapter is on its base
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat  # the format of the training
    base_name: str | None = None  # path of the base model if it was moved
    _base: Any = None
    with_base: bool = True  # what is measured is measured of the base, too

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer: the trained one, others that end model turns, those of the model's config."""
        trained = self.result.chat["stop_token_id"]
        others = [*end_token_ids(self.chat_format), *loader.eos_token_ids(self.tuned.generation_config)]
        return list(dict.fromkeys(others if trained is None else [trained, *others]))

    @contextmanager
    def base(self) -> Iterator[Any]:
        """Yield the base model, to be used inside the block.

        An adapter is disabled; the base of a full model is loaded the first time and kept.
        """
        if self.result.adapter is not None and self._base is None:
            with self.tuned.disable_adapter():
                yield self.tuned
            return
        if self._base is None:
            self._base = load_base(self.result, self.tokenizer, name=self.base_name)
        yield self._base


def load_for_inference(
    result: RunResult, *, base_name: str | None = None, only_base: bool = False, unquantized: bool = False
) -> LoadedModel:
    """Load a result on the GPUs, spread over several if one is too small, or on the CPU.

    Args:
        base_name: Path of the base model if it was moved.
        unquantized: Load the base as it is stored even if training quantized it.
        only_base: Load the base in place of the trained weights.

    Raises:
        ConfigError: The base of an adapter is missing.
        CheckpointError: It has other weights than those that were trained, or the adapter does not fit.
    """
    tokenizer = load_tokenizer(result)
    chat_format = chat_format_of(result, tokenizer)
    bits = None if unquantized else result.base_bits
    if only_base:
        base = load_base(result, tokenizer, name=base_name, bits=bits)
        return LoadedModel(result, base, tokenizer, chat_format, base_name, base)
    if result.adapter is None:
        tuned = _load(result.folder, result)
    else:
        tuned = load_saved_adapter(load_base(result, tokenizer, name=base_name, bits=bits), result.folder)
    return LoadedModel(result, tuned.eval(), tokenizer, chat_format, base_name)


def read_model(folder: Path, *, trust_remote_code: bool) -> RunResult:
    """Describe a model without run.json as a result without a base."""
    if is_adapter(folder):
        raise ConfigError(f"{folder}: an adapter without run.json: its base and chat format are unknown")
    from transformers import AutoConfig

    with loader.damage_named(f"{folder}: holds neither run.json nor a model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = loader.load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    is_lingowhale = "lingowhale" in (config.model_type or "").lower()
    if tokenizer.chat_template is None and not is_lingowhale:
        raise ConfigError(f"{folder}: the chat format is unknown: no run.json, and no chat template in the tokenizer")
    format_name = "the tokenizer's own chat template" if tokenizer.chat_template else "lingowhale"
    run = {
        "model": {"name": str(folder), "folder": str(folder.absolute())},
        "chat": {"format": format_name, **asdict(DEFAULT_SETTINGS), "stop_token_id": None},
        "precision": loader.precision_of(config.dtype),
    }
    return RunResult(folder, run, None, is_trained=False, trusts_code=trust_remote_code)


def load_tokenizer(result: RunResult) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with the result, including new tokens and its chat template."""
    return loader.load_tokenizer(str(result.folder), trust_remote_code=result.trusts_code)


def chat_format_of(result: RunResult, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Return the chat format of the training; a template is part of the saved tokenizer."""
    settings = replace(fill(ChatSettings, result.chat), history="as_served")
    template = "lingowhale" if result.chat["format"] == "lingowhale" else None
    return select_chat_format(tokenizer, template, settings)[0]


def base_folder(result: RunResult, name: str | None = None) -> Path:
    """Return the folder of the base, `name` if it was moved, after checking that the training started from its weights.

    A base on the hub is taken from the cache; missing files are downloaded.
    """
    folder = result.base_path(name)
    if not folder.is_dir():
        folder = _download_base(result)
    fingerprint = weights_fingerprint(str(folder))
    if fingerprint is None:
        raise CheckpointError(
            f"{result.folder}: weights of its base {folder} are missing: give a complete folder with --base_model"
        )
    if fingerprint != result.base["weights"]:
        raise CheckpointError(
            f"{result.folder}: was trained on {result.base['name']}, but {folder} holds other weights (fingerprint "
            f"{fingerprint[:12]}, expected {str(result.base['weights'])[:12]}): give the right folder with --base_model"
        )
    return folder


def _download_base(result: RunResult) -> Path:
    """Return the base in the hub's cache: config, tokenizer, code, and the weights in one format only."""
    from huggingface_hub import snapshot_download

    name, revision = result.base["name"], result.base["revision"]
    folder = local_model_dir(name, revision)
    for weights in WEIGHTS_FILES:
        if weights_fingerprint(str(folder)) is None:
            stem, suffix = weights.split(".")
            patterns = [*OTHER_MODEL_FILES, f"{stem}*.{suffix}"]
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
            except hub_errors() as error:
                raise ConfigError(
                    f"{result.folder}: its base {name} could not be downloaded: {first_line(error)}"
                ) from None
    return folder


def trusts_code_in(folder: Path, result: RunResult) -> bool:
    """Whether the Python files in a result's folder, or in that of its base, may run; say whose do.

    Without the flag only those of the one repository that needs none, at the newest commit of its main branch.
    """
    name = result.base["name"]
    if not result.trusts_code and needs_no_trust(name) and folder == local_model_dir(name):
        log_notes(filter(None, [loader.code_note(name)]))
        return True
    if result.trusts_code:
        log_notes(filter(None, [loader.code_note(str(folder))]))
    return result.trusts_code


def load_base(
    result: RunResult, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None, bits: int | None = None
) -> Any:
    """Load the base model, quantized to `bits`, its vocabulary large enough for the tokenizer of the result."""
    base = _load(base_folder(result, name), result, bits)
    if loader.embedding_rows(tokenizer) > base.config.get_text_config().vocab_size:
        base.resize_token_embeddings(loader.embedding_rows(tokenizer))
    return base.eval()


def load_saved_adapter(base: Any, folder: Path) -> Any:
    """Load a saved adapter on its base, and on the device of that: peft would choose a GPU, if there is one.

    Whole modules that it saves get the type of a base in 16 bits, with whose layers they compute.
    """
    from peft import PeftModel

    # The first concerns adapters on one side of tied embeddings, which work as they are; the second, names of experts
    # that peft writes itself.
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True. and a tied layer is part of the adapter")
    warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match any targeted module")
    try:
        adapted = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True, torch_device=str(base.device))
    except (RuntimeError, ValueError) as error:
        reason = lines_of(str(error))[:2][-1]  # the first is a title
        raise CheckpointError(f"{folder}: the adapter does not fit its base: {reason}: copy it again") from None
    for name, weight in adapted.named_parameters():
        if ".modules_to_save." in name and weight.dtype.itemsize > base.dtype.itemsize:
            weight.data = weight.data.to(base.dtype)
    return adapted


def _load(folder: Path, result: RunResult, bits: int | None = None) -> Any:
    import torch

    may_miss = None if result.run.get("arguments", {}).get("allow_missing_weights") else ()
    trusts_code = trusts_code_in(folder, result)
    empty = check_saved_weights(folder, trusts_code=trusts_code, may_miss=may_miss)
    options: dict[str, Any]
    if torch.cuda.is_available():
        options = {"dtype": loader.torch_dtype(result.precision), "device_map": _device_map()}
    else:
        options = {"dtype": _cpu_dtype(folder)}
    if bits is not None:
        check_installed(f"{result.folder}: its base was trained in {bits} bits")
        options["dtype"] = loader.torch_dtype(result.precision) if torch.cuda.is_available() else torch.float32
    config = model_config(folder, trusts_code)
    try:
        if bits or result.is_trained:
            options |= quantized_loading(bits, options["dtype"], config, empty)
        return auto_class(config).from_pretrained(folder, trust_remote_code=trusts_code, **options)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        kind = ConfigError if isinstance(error, ImportError) else CheckpointError  # a package is missing
        raise kind(f"{folder}: its weights do not load: {first_line(error)}") from None


def _device_map() -> str | dict[str, int]:
    """Return the GPU of this rank, or "auto" for a single process, which may use several GPUs."""
    is_single = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return "auto" if is_single else {"": int(os.environ.get("LOCAL_RANK", "0"))}


def _cpu_dtype(folder: Path) -> torch.dtype | str:
    """Return float32, the fastest type on a CPU, or the stored type if float32 weights would not fit in memory."""
    import torch

    stored = stored_bytes(folder) or 0
    return torch.float32 if 2 * stored <= MEMORY_FRACTION * free_memory() else "auto"


def check_saved_weights(folder: Path, *, trusts_code: bool, may_miss: tuple[str, ...] | None = ()) -> Any:
    """Check that a saved model holds every weight, and no other, see `check_weights`; return it on the meta device.

    Raises:
        CheckpointError: Weights are missing, unexpected or of another shape.
    """
    with loader.damage_named(f"{folder}: its weights do not load", CheckpointError):
        config = model_config(folder, trusts_code)
        empty = empty_model(config, trust_remote_code=trusts_code)
    check_weights(folder, empty, config, label=str(folder), may_miss=may_miss, error=CheckpointError)
    return empty


def model_config(folder: Path, trusts_code: bool) -> Any:
    """Return the config of a model's folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code)


def load_strict(folder: Path, dtype: torch.dtype, *, trusts_code: bool) -> Any:
    """Load a model with plain transformers and require that every weight is there, and no other."""
    check_saved_weights(folder, trusts_code=trusts_code)
    return (
        auto_class(model_config(folder, trusts_code))
        .from_pretrained(folder, dtype=dtype, trust_remote_code=trusts_code)
        .eval()
    )


def free_memory() -> int:
    """Return the bytes of memory available without swapping."""
    import psutil

    return psutil.virtual_memory().available


def memory_shortage(needed: float) -> str | None:
    """Return why `needed` bytes of memory cannot be used, or None if they can."""
    free = free_memory()
    return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free" if needed > free else None
