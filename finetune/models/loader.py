"""Load the tokenizer and the base model for training.

`inspect_model` first checks what can be known without reading weights: the model exists, is a causal language model,
may run its own code, supports the requested attention, and its files hold what its code expects. Under ZeRO-3,
transformers partitions the model while it loads: rank 0 reads the files and the other ranks receive their shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.arguments import ModelArguments
from finetune.config.hardware import Precision
from finetune.distributed.collectives import run_on_all_ranks
from finetune.models import model_folder
from finetune.models.auto_class import auto_class, empty_model
from finetune.models.base_checks import check_finite, check_weights
from finetune.models.compat import convert_by_whole_shapes, leave_scales_out
from finetune.models.module_kinds import VISION, ModuleKinds, module_kinds
from finetune.models.quantization import base_bits, is_packed_in_files, quantized_loading, stored_method
from finetune.utils.console import log_notes
from finetune.utils.errors import ConfigError, FinetuneError, first_line
from finetune.utils.hub import hub_file, use_cache_if_hub_unreachable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".tiktoken", ".txt", ".jinja", ".py", ".gguf")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
MAX_REASON = 300  # characters of an error of transformers


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read.

    Attributes:
        attention: Attention implementation that will be used.
        empty: The model on the meta device: modules and shapes, no values.
        may_miss: Modules whose weights the files may lack, by the last part of their names; None: all.
        notes: Lines for the user.
        bits: 4 or 8 where the weights are quantized: stored so, or while they load.
        adapter: Folder of the adapter that training continues from.
    """

    name: str
    revision: str | None
    trusts_code: bool
    config: Any
    attention: str
    empty: Any
    may_miss: Collection[str] | None
    notes: tuple[str, ...]
    bits: int | None = None
    adapter: str | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.empty.parameters())

    @property
    def flag(self) -> str:
        """The flag that names the model, for messages."""
        return f"--model_name_or_path {self.name}"

    @property
    def files(self) -> Path:
        """Folder of the model's files; of a hub model in the cache, which may be empty."""
        return model_folder.local_model_dir(self.name, self.revision)

    def is_downloaded(self) -> bool:
        """Whether the weights are here: always those of a local folder."""
        files = [path.is_file() for path in model_folder.weight_files(self.files)]
        return Path(self.name).expanduser().is_dir() or bool(files and all(files))

    def check_weights(self) -> list[str]:
        """Check the files against the model's code, if they are here; return notes for the user.

        Raises:
            ConfigError: Tensors are missing, unexpected or misshapen.
        """
        if not self.is_downloaded():
            return []
        return check_weights(self.files, self.empty, self.config, label=self.flag, may_miss=self.may_miss)

    @cached_property
    def kinds(self) -> ModuleKinds:
        """The kinds of its modules."""
        return module_kinds(self.empty)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the files of the model, and of the adapter to continue from; computed once."""
        base = model_fingerprint(self.name, self.revision)
        adapter_files = sorted(Path(self.adapter).glob("adapter_*")) if self.adapter else []
        return base if self.adapter is None else f"{base}, adapter {model_folder.digest_of_files(adapter_files)}"

    def facts(self) -> dict[str, Any]:
        """Identify the model in JSON values; `weights` is None while they are not downloaded."""
        folder = Path(self.name).expanduser()
        revision = self.revision or getattr(self.config, "_commit_hash", None)
        return {
            "name": self.name,
            "folder": str(folder.absolute()) if folder.is_dir() else None,
            "revision": revision,
            "fingerprint": self.fingerprint,
            "weights": model_folder.weights_fingerprint(self.name, revision),
            "auto_class": auto_class(self.config).__name__,
            "trusts_code": self.trusts_code,
        }


def inspect_model(model: ModelArguments, attention: str, may_miss: Collection[str] | None = ()) -> ModelInfo:
    """Check whether the model can be loaded as requested, without reading its weights.

    Args:
        may_miss: Modules whose weights the files may lack, by the last part of their names; None: all.

    Raises:
        ConfigError: No such model, or no model; not a causal language model; quantized; Python code without
            `--trust_remote_code True`; a revision of a local folder; weights that do not fit the config.
    """
    from transformers import AutoConfig

    name, revision, trusts_code = model.model_name_or_path, model.model_revision, model.trusts_code()
    if not Path(name).exists():
        use_cache_if_hub_unreachable()
    model_folder.check_folder(name)
    code = code_note(name, revision) if trusts_code else None
    config_file = f"--model_name_or_path {name}: config.json"
    with damage_named(config_file), _model_errors(name):
        config = AutoConfig.from_pretrained(name, **_revision_options(name, revision), trust_remote_code=trusts_code)
        bits = base_bits(name, config, model.quantized_bits())
    for candidate in dict.fromkeys((attention, "sdpa", "eager")):
        try:
            with damage_named(config_file), _model_errors(name):
                options = {"trust_remote_code": trusts_code, **_code_revision_option(revision)}
                empty = empty_model(config, attn_implementation=candidate, **options)
        except ConfigError:
            if candidate == "eager":
                raise
            continue
        notes = [code] if code else []
        if is_packed_in_files(config) and bits is None:
            notes.append(f"weights are stored as {stored_method(config)} and dequantized while they load")
        if candidate != attention:
            notes.append(f"fallback to {candidate} attention because the model does not support {attention}")
        info = ModelInfo(
            name, revision, trusts_code, config, candidate, empty, may_miss, (), bits, model.adapter_name_or_path
        )  # fmt: skip
        return replace(info, notes=(*notes, *info.check_weights()))
    raise AssertionError("the last candidate either returned or raised")


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        ConfigError: No such model, a revision of a local folder, or the tokenizer needs untrusted code or a package
            that is not installed.
    """
    model_folder.check_tokenizer_files(name)
    model_folder.check_json_files(Path(name).expanduser())
    from transformers import AutoTokenizer

    files = [file for file in TOKENIZER_FILES if (Path(name).expanduser() / file).is_file()]
    fault = f"--model_name_or_path {name}: the tokenizer could not be loaded" + (
        f" ({', '.join(files)})" if files else ""
    )
    with damage_named(fault), _model_errors(name):
        return AutoTokenizer.from_pretrained(
            name, **_revision_options(name, revision), trust_remote_code=trust_remote_code
        )


def load_model(
    info: ModelInfo,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    stop_token_id: int | None,
    compute_precision: Precision = "float32",
) -> Any:
    """Load the base model in its training precision, its vocabulary large enough for the tokenizer.

    Args:
        precision: Of the weights.
        stop_token_id: Token that ends a turn in training; generation stops there too.
        compute_precision: That quantized weights are multiplied in.

    Raises:
        ConfigError: The weights do not load, do not fit the config or are not finite.
    """
    was_checked = info.is_downloaded()
    convert_by_whole_shapes()
    with _model_errors(info.name):
        model = auto_class(info.config).from_pretrained(
            info.name,
            **_revision_options(info.name, info.revision),
            config=info.config,
            dtype=torch_dtype(precision),
            attn_implementation=info.attention,
            trust_remote_code=info.trusts_code,
            **quantized_loading(info.bits, torch_dtype(compute_precision), info.config, info.empty),
        )
    if info.bits:
        leave_scales_out(model)
    if not was_checked:  # they have just come from the hub
        log_notes(info.check_weights())
    run_on_all_ranks(lambda: check_finite(model, info.files, label=info.flag))
    conversions = getattr(info.empty, "_weight_conversions", None)  # those of them that `check_weights` found in use
    is_dequantized = info.bits is None and is_packed_in_files(info.config)
    if conversions is not None or is_dequantized:
        # Under ZeRO-3 transformers 5.23 notes all, and would save under other names: those of packed weights, too.
        model._weight_conversions = conversions
    freeze_untrained(model, info.kinds)
    if needs_new_embeddings(info, tokenizer):
        model.resize_token_embeddings(embedding_rows(tokenizer))
    if stop_token_id is not None and model.generation_config is not None:
        add_eos_token(model.generation_config, stop_token_id)
    return model


def freeze_untrained(model: Any, kinds: ModuleKinds) -> None:
    """Freeze what reads images and sound, which text does not train, and what the model's code keeps from training.

    The latter is trainable after `from_pretrained` of transformers 5.23: weight decay would change it.
    """
    for name, parameter in model.named_parameters():
        if kinds.of(name) == VISION or name in kinds.untrained:
            parameter.requires_grad_(False)


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the torch type of a precision."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[precision]


def precision_of(dtype: torch.dtype | str | None) -> Precision:
    """Return the precision of a torch type; float32 for any other type."""
    name = str(dtype).rpartition(".")[2]
    return "bf16" if name == "bfloat16" else "fp16" if name == "float16" else "float32"


def _revision_options(name: str, revision: str | None) -> dict[str, str]:
    """Return the arguments of `from_pretrained` that select a revision of a repository and of its code."""
    model_folder.check_revision(name, revision)
    return {} if revision is None else {"revision": revision, **_code_revision_option(revision)}


def _code_revision_option(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"code_revision": revision}


def code_note(name: str, revision: str | None = None) -> str | None:
    """Say whose Python files would run, and which revision, without running them; None if there are none.

    Raises:
        ConfigError: No such model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*.py") if path.is_file())
        digest = hashlib.sha256(b"".join(b"%s %d " % (path.name.encode(), path.stat().st_size) + path.read_bytes()
                                         for path in files)).hexdigest()  # fmt: skip
        names = ", ".join(str(path.relative_to(folder)) for path in files[:4]) + (", ..." if len(files) > 4 else "")
        return f"trusting the Python files in {name}: {names} (sha256 {digest[:12]})" if files else None
    with _model_errors(name):
        owners = _owners_of_code(name, revision)
        if not owners:
            return None
        commit = _commit_of(name, revision)
    others = [f"{owner} (its newest commit)" for owner in owners if owner != name]
    advice = "" if revision or not commit else f"; pin it with --model_revision {commit} --trust_remote_code True"
    whose = " and ".join([f"{name} at commit {commit or 'unknown'}", *others])
    return f"trusting the Python files of {whose}{advice}"


def _owners_of_code(name: str, revision: str | None) -> list[str]:
    """Return the repositories whose code the model's files refer to."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    tokenizer = get_tokenizer_config(name, revision=revision)
    values = [value for source in (config, tokenizer) for value in (source.get("auto_map") or {}).values()]
    classes = [path for value in values for path in (value if isinstance(value, list | tuple) else [value]) if path]
    return sorted({path.partition("--")[0] if "--" in path else name for path in classes})


def _commit_of(name: str, revision: str | None) -> str | None:
    """Return the commit that a revision of a repository points to; None if unknown."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def needs_new_embeddings(info: ModelInfo, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has tokens without an embedding in the model."""
    return embedding_rows(tokenizer) > info.config.get_text_config().vocab_size


def embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows that the tokenizer needs."""
    return _embedding_rows(tokenizer, len(tokenizer))


@lru_cache(maxsize=1)
def _embedding_rows(tokenizer: PreTrainedTokenizerBase, _: int) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def eos_token_ids(generation_config: Any) -> list[int]:
    """Return the tokens that end a generation."""
    ids = getattr(generation_config, "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def add_eos_token(generation_config: Any, token_id: int) -> None:
    """Let generation end at this token, too."""
    ids = eos_token_ids(generation_config)
    if token_id not in ids:
        generation_config.eos_token_id = [*ids, token_id]


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """Return the fingerprint of a model: its commit on the hub, or a digest of the files of a local folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        with _model_errors(name):
            return f"commit {_commit_of(name, revision) or 'unknown'}"
    return model_folder.digest_of_files(
        path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES and path.is_file()
    )


@contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """Turn the errors of transformers about missing or unsupported models into a `ConfigError`."""
    flag, path = f"--model_name_or_path {name}", Path(name).expanduser()
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not path.exists():
        raise ConfigError(f"{flag}: there is no such folder")
    try:
        yield
    except (OSError, ValueError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ConfigError(f"{flag}: not a causal language model: give one that generates text") from None
        if isinstance(error, OSError):
            if not path.exists():
                hub_file(name, "config.json")  # says why there is no such model
            where = "the folder exists, but " if path.exists() else ""
            raise ConfigError(f"{flag}: {where}{first_line(error)}") from None
        raise


@contextmanager
def damage_named(label: str, error: type[FinetuneError] = ConfigError) -> Iterator[None]:
    """Turn whatever transformers raises while it reads a config or a tokenizer into an error of the class `error`.

    Raises:
        ConfigError: The model has Python files of its own that are not trusted.
    """
    try:
        yield
    except FinetuneError:
        raise
    except Exception as problem:  # damaged files fail in any way
        if isinstance(problem, ValueError) and "trust_remote_code" in str(problem):
            raise ConfigError(
                f"{label}: the model has Python files of its own; if you trust them, give --trust_remote_code True"
            ) from None
        kind = "" if isinstance(problem, OSError | ValueError | ImportError) else f"{type(problem).__name__}: "
        raise error(f"{label}: {kind}{' '.join(str(problem).split())[:MAX_REASON]}") from problem
