"""Tokenizer and base model, ready for training.

What can be found out without reading a weight is checked first (`check`): that the model is there, that it is a causal
language model, that its own code may run, that it has the attention asked for. Under ZeRO-3 transformers partitions
the model while it loads: rank 0 reads the files, the others receive their shares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.config.hardware import Precision
from finetune.utils.errors import ConfigError, FinetuneError, first_line
from finetune.utils.hub import use_cache_if_hub_unreachable

MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".tiktoken", ".txt", ".jinja", ".py", ".gguf")
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # each alone, or as an index of shards
BLOCK_BYTES, BLOCKS_READ = 1 << 18, 64


@dataclass(frozen=True)
class ModelInfo:
    """What `check` learned: the model's config and class, the attention it will use, and lines for the user."""

    name: str
    revision: str | None
    config: Any
    attention: str
    can_checkpoint: bool
    code: type
    notes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Of the model's files, taken once."""
        return model_fingerprint(self.name, self.revision)

    def facts(self) -> dict[str, Any]:
        """Which model it is, and in which state; JSON values. `weights` is None while they are not here yet."""
        folder = Path(self.name).expanduser()
        revision = self.revision or getattr(self.config, "_commit_hash", None)
        return {
            "name": self.name,
            "folder": str(folder.absolute()) if folder.is_dir() else None,
            "revision": revision,
            "fingerprint": self.fingerprint,
            "weights": weights_fingerprint(self.name, revision),
        }


def inspect_model(name: str, *, revision: str | None = None, trust_remote_code: bool, attention: str) -> ModelInfo:
    """Find out whether the model can be loaded as asked, without reading its weights.

    Raises:
        ConfigError: no such model; not a causal language model; code of its own without `--trust_remote_code True`;
            a revision of a folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not Path(name).exists():
        use_cache_if_hub_unreachable()
    code = code_note(name, revision) if trust_remote_code else None
    with _explained(name):
        config = AutoConfig.from_pretrained(name, **_of(name, revision), trust_remote_code=trust_remote_code)
    for candidate in dict.fromkeys((attention, "sdpa", "eager")):
        try:
            with _explained(name), torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(
                    config, attn_implementation=candidate, trust_remote_code=trust_remote_code, **_code_of(revision)
                )
        except (ImportError, ValueError) as error:
            if candidate == "eager":
                raise ConfigError(f"--model_name_or_path {name}: {first_line(error)}") from None
            continue
        notes = [code] if code else []
        notes += [] if candidate == attention else [f"this model has no {attention} attention: using {candidate}"]
        return ModelInfo(
            name, revision, config, candidate, bool(empty.supports_gradient_checkpointing), type(empty), tuple(notes)
        )
    raise AssertionError("the last candidate either returned or raised")


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: no such model, a revision of a folder, or its tokenizer needs code of its own or a package that is
            missing.
    """
    from transformers import AutoTokenizer

    with _explained(name):
        try:
            return AutoTokenizer.from_pretrained(name, **_of(name, revision), trust_remote_code=trust_remote_code)
        except (ImportError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise
            raise ConfigError(
                f"--model_name_or_path {name}: its tokenizer does not load: {first_line(error)}"
            ) from None


def load_model(
    checked: ModelInfo, tokenizer: Any, *, precision: Precision, trust_remote_code: bool, stop_token_id: int | None
) -> Any:
    """The base model in its training precision, its vocabulary large enough for the tokenizer.

    `stop_token_id` is the token that training teaches the model to end a turn with; generation stops there too.
    """
    from transformers import AutoModelForCausalLM

    with _explained(checked.name):
        model = AutoModelForCausalLM.from_pretrained(
            checked.name,
            **_of(checked.name, checked.revision),
            config=checked.config,
            dtype=torch_dtype(precision),
            attn_implementation=checked.attention,
            trust_remote_code=trust_remote_code,
        )
    if needs_new_embeddings(checked, tokenizer):
        model.resize_token_embeddings(embedding_rows(tokenizer))
    if stop_token_id is not None and model.generation_config is not None:
        set_eos_token(model.generation_config, stop_token_id)
    return model


def torch_dtype(precision: str) -> Any:
    """Return torch's dtype for bf16, fp16 or float32."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[precision]


def _of(name: str, revision: str | None) -> dict[str, str]:
    """What says to transformers which state of a repository is meant, its code included."""
    if revision is None:
        return {}
    if Path(name).expanduser().is_dir():
        raise ConfigError(f"--model_revision {revision}: {name} is a folder; only models on the hub have revisions")
    return {"revision": revision, **_code_of(revision)}


def _code_of(revision: str | None) -> dict[str, str]:
    return {} if revision is None else {"code_revision": revision}


def code_note(name: str, revision: str | None = None) -> str | None:
    """Whose Python files would run, and in which state: found out without running them. None where there are none.

    Raises:
        ConfigError: no such model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*.py") if path.is_file())
        digest = hashlib.sha256(b"".join(b"%s %d " % (path.name.encode(), path.stat().st_size) + path.read_bytes()
                                         for path in files)).hexdigest()  # fmt: skip
        names = ", ".join(str(path.relative_to(folder)) for path in files[:4]) + (", ..." if len(files) > 4 else "")
        return f"trusting the Python files in {name}: {names} (sha256 {digest[:12]})" if files else None
    with _explained(name):
        owners = _owners_of_code(name, revision)
        if not owners:
            return None
        commit = _commit_of(name, revision)
    others = [f"{one} (its newest commit)" for one in owners if one != name]
    advice = "" if revision else f"; pin it with --model_revision {commit}" if commit else ""
    whose = " and ".join([f"{name} at commit {commit or 'unknown'}", *others])
    return f"trusting the Python files of {whose}{advice}"


def _owners_of_code(name: str, revision: str | None) -> list[str]:
    """The repositories whose code the model's files name."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    tokenizer = get_tokenizer_config(name, revision=revision)
    named = [one for holder in (config, tokenizer) for one in (holder.get("auto_map") or {}).values()]
    references = [part for one in named for part in (one if isinstance(one, list | tuple) else [one]) if part]
    return sorted({part.partition("--")[0] if "--" in part else name for part in references})


def _commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a revision of a repository is now; None where nothing tells it."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def needs_new_embeddings(checked: ModelInfo, tokenizer: Any) -> bool:
    """Whether the tokenizer has tokens for which the model has no embedding yet."""
    return embedding_rows(tokenizer) > checked.config.get_text_config().vocab_size


def embedding_rows(tokenizer: Any) -> int:
    """Rows of the embeddings that give every token one."""
    return max(tokenizer.get_vocab().values()) + 1


def set_eos_token(generation_config: Any, token_id: int) -> None:
    """Generation ends at this token, too."""
    stops = generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if token_id not in stops:
        generation_config.eos_token_id = [*stops, token_id]


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """What tells a model from another: the commit of one on the hub, else a digest of a folder's files."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        with _explained(name):
            return f"commit {_commit_of(name, revision) or 'unknown'}"
    return _digest(path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES and path.is_file())


def weights_fingerprint(name: str, revision: str | None = None) -> str | None:
    """A digest of the weights alone, alike for a model on the hub and a copy of it; None where not all are here."""
    files = weight_files(local_model_dir(name, revision))
    return _digest(files) if files and all(path.is_file() for path in files) else None


def local_model_dir(name: str, revision: str | None = None) -> Path:
    """Where a model's files lie: of one on the hub, in the cache; a folder without files while none are there."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else folder


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read a model's weights from, in its order of choice; empty where none are.

    What an index names is listed whether it is there or not. Other weights in the folder, in another format or of an
    adapter, do not count.
    """
    for single in WEIGHTS_FILES:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / name for name in sorted(names)]
    return []


def _digest(files: Iterable[Path]) -> str:
    """xxh3-128 over files: small ones whole, of a large one its size, ends and blocks in between.

    It tells models apart, also two that differ in a few layers; it does not prove that every byte is the same.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        count = min(BLOCKS_READ, -(-size // BLOCK_BYTES))
        with path.open("rb") as file:
            for number in range(count):
                file.seek(number * (size - BLOCK_BYTES) // max(count - 1, 1) if size > BLOCK_BYTES else 0)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def stored_bytes(folder: Path) -> int | None:
    """Of the weights in a model's folder; None where there are none."""
    return sum(path.stat().st_size for path in weight_files(folder) if path.is_file()) or None


class _explained:
    """Turns what transformers says about a missing or foreign model into one `ConfigError`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        path = Path(self.name).expanduser()
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") > 1
        if looks_local and not path.exists():
            raise ConfigError(f"--model_name_or_path {self.name}: there is no such folder")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, FinetuneError):
            return
        text = str(error)
        if "trust_remote_code" in text:
            raise ConfigError(
                f"--model_name_or_path {self.name}: this model comes with Python files of its own; when you trust "
                "them, give --trust_remote_code True"
            ) from None
        if "Unrecognized configuration class" in text:
            raise ConfigError(f"--model_name_or_path {self.name}: not a causal language model") from None
        if isinstance(error, OSError):
            local = Path(self.name).exists()
            where = "the folder is there, but" if local else "there is no such folder, and the model hub has no answer:"
            raise ConfigError(f"--model_name_or_path {self.name}: {where} {first_line(error)}") from None
