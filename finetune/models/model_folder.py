"""The files of a model's folder: which hold the weights, and whether the folder holds a base model at all."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.run_dir.run_json import ADAPTER_CONFIG
from finetune.utils.errors import CheckpointError, ConfigError, FinetuneError, format_names, near_paths
from finetune.utils.user_files import UNREADABLE, read_json_object

JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
PARTS, MOST_PARTS = re.compile(r"(layers?|experts?|per_tok)$"), 16384
SIZES = re.compile(
    r"(size|heads?|(?<!feature_)(?<!vision_)layers?|experts?|dim|rank|embd|inner|positions|embeddings|per_tok)$"
)
NEVER_ZERO = re.compile(
    r"(hidden_size|^vocab_size|hidden_layers|heads|n_(head|embd|layer|positions)|embeddings|per_tok)$"
)
TOKENIZER = re.compile(r"^(tokeniz|vocab|merges)|\.(model|tiktoken|bpe|gguf)$|spm|bpe")
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # each alone, or as an index of shards
LARGEST_POINTER = 1024  # bytes
BLOCK_BYTES, BLOCKS_READ = 1 << 18, 64  # of a file that a fingerprint is made of


def weight_map(folder: Path, *, error: type[FinetuneError] = CheckpointError) -> dict[str, list[str]]:
    """Return the files from which transformers would read the weights, each with the tensors that an index says.

    Files named by an index are listed whether they exist or not. Weights in other formats and adapters do not count.

    Raises:
        FinetuneError: Of the class `error`: the index cannot be read.
    """
    for single in WEIGHTS_FILES:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return {single: []}
        if index.is_file():
            files: dict[str, list[str]] = {}
            try:
                for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                    if not re.fullmatch(r"[\w. +=@-]{1,200}", name) or not name.endswith((".safetensors", ".bin")):
                        raise ValueError(f"{name[:99]!r} is not the name of a file of weights beside it")
                    files.setdefault(name, []).append(tensor)
            except UNREADABLE as problem:
                reason = f"{type(problem).__name__}: {problem}"
                raise error(f"{index}: not an index of weights ({reason}): copy the file again") from None
            return dict(sorted(files.items()))
    return {}


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of `weight_map`; empty if the folder holds no weights."""
    return [folder / name for name in weight_map(folder)]


def stored_bytes(folder: Path) -> int | None:
    """Return the size of the weights in a model's folder; None if there are none."""
    return sum(path.stat().st_size for path in weight_files(folder) if path.is_file()) or None


def check_folder(name: str) -> None:
    """Check that a path, if it is one, is the folder of a model with its config and weights.

    Raises:
        ConfigError: A file, an adapter, a checkpoint without model files, a folder without config or weights, or one
            whose JSON files are damaged or whose weights are pointers of Git LFS.
    """
    folder, flag = Path(name).expanduser(), f"--model_name_or_path {name}"
    if folder.is_file():
        raise ConfigError(f"{flag}: is a file: give the folder that holds config.json and the weights")
    if not folder.is_dir():
        if "://" in name:
            raise ConfigError(f"{flag}: is an address: give the model's name, owner/name, or a folder with its files")
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ConfigError(f"{flag}: there is no such folder{near_paths(folder)}")
        return
    check_json_files(folder)
    if (folder / "config.json").is_file() and (weights := weight_map(folder, error=ConfigError)):
        _check_fetched(folder / file for file in weights)
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{flag}: is an adapter, not a model: give its base, or a model with the adapter merged into it "
            f"(`finetune merge {name} DIR`)"
        )
    if (folder / "latest").is_file():
        raise ConfigError(
            f"{flag}: is a checkpoint of DeepSpeed without the files of a model: make one of it with `finetune merge "
            f"{name} DIR`, or resume its run with --resume_from_checkpoint {name}"
        )
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; found in it: {format_names(inside)}" if inside else "" if any(folder.iterdir()) else "; it is empty"
        if (folder / "model_index.json").is_file():
            hint = "; this is a pipeline of diffusers, not a language model"
        raise ConfigError(f"{flag}: holds no config.json: give the folder of a model{hint}")
    others = sorted(path.name for suffix in ("gguf", "safetensors", "bin", "pt") for path in folder.glob(f"*.{suffix}"))
    found = f"; {format_names(others)} cannot be read as such" if others else ""
    raise ConfigError(
        f"{flag}: holds no weights: expected {' or '.join(WEIGHTS_FILES)}, or their index and shards{found}: copy the "
        "whole model"
    )


def check_revision(name: str, revision: str | None) -> None:
    """Check that a revision is one of a model on the hub.

    Raises:
        ConfigError: The model is a folder.
    """
    if revision is not None and Path(name).expanduser().is_dir():
        raise ConfigError(
            f"--model_revision {revision}: {name} is a folder, and only models on the hub have revisions: leave it out"
        )


def check_tokenizer_files(name: str) -> None:
    """Check that a path, if it is one, is a folder with a tokenizer.

    Raises:
        ConfigError: There is no such folder, or no file in it is a tokenizer's; what it is instead.
    """
    folder, flag = Path(name).expanduser(), f"--model_name_or_path {name}"
    if not folder.is_dir():
        check_folder(name)
    elif not any(TOKENIZER.search(path.name) for path in folder.iterdir()):
        if not (folder / "config.json").is_file():
            check_folder(name)
        check_json_files(folder)
        raise ConfigError(f"{flag}: holds no tokenizer (tokenizer.json, tokenizer.model, ...): copy the whole model")


def check_json_files(folder: Path) -> None:
    """Check that the JSON files of a model or tokenizer are objects, with values that a model may have.

    Raises:
        ConfigError: Naming the file; also a file of the tokenizer that is truncated, or a pointer of Git LFS.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    _check_fetched(path for path in files if path.name in JSON_FILES or TOKENIZER.search(path.name))
    large = folder / "tokenizer.json"  # megabytes: its ends show whether it was copied to the end
    if large.is_file() and not re.fullmatch(rb"\s*\{.*\}\s*", large.read_bytes(), re.DOTALL):
        raise ConfigError(f"{large}: not a JSON object, it may be truncated: copy it again")
    for path in filter(Path.is_file, (folder / file for file in JSON_FILES)):
        values = read_json_object(path)
        nested = values.get("text_config")
        for key, value in [*values.items(), *(nested.items() if isinstance(nested, dict) else ())]:
            if not _is_possible(key, value):
                raise ConfigError(f"{path}: {key} {value!r:.99}: no model has this: copy the file again")


def _check_fetched(paths: Iterable[Path]) -> None:
    pointers = [path for path in paths if path.is_file() and is_lfs_pointer(path)]
    if pointers:
        names = format_names([path.name for path in pointers])
        raise ConfigError(f"{pointers[0].parent}: holds pointers of Git LFS, not {names}: run git lfs pull there")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git checks out without Git LFS: a few lines that name the real one."""
    if path.stat().st_size > LARGEST_POINTER:
        return False
    with path.open("rb") as file:
        return file.read(64).startswith(b"version https://git-lfs")


def _is_possible(key: str, value: Any) -> bool:
    """Whether a value of a model's JSON files can be meant; others make transformers fail late, or build for hours."""
    if key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = value if isinstance(value, list) else [value or 0]
        return all(type(number) is int for number in ids)
    if type(value) is not int:
        return True
    too_many = value > MOST_PARTS and PARTS.search(key)
    return not (too_many or (value < 0 and SIZES.search(key)) or (value == 0 and NEVER_ZERO.search(key)))


def digest_of_files(files: Iterable[Path]) -> str:
    """Compute an xxh3-128 digest: of small files completely, of large ones the size, both ends and sampled blocks.

    It tells models apart, even two that differ in a few layers only; it does not prove that every byte is the same.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        count = min(BLOCKS_READ, -(-size // BLOCK_BYTES))
        with path.open("rb") as file:
            for block in range(count):
                file.seek(block * (size - BLOCK_BYTES) // max(count - 1, 1) if size > BLOCK_BYTES else 0)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def weights_fingerprint(name: str, revision: str | None = None) -> str | None:
    """Return a digest of the weights alone, the same on the hub and in a copy; None if weights are missing."""
    files = weight_files(local_model_dir(name, revision))
    return digest_of_files(files) if files and all(path.is_file() for path in files) else None


def local_model_dir(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model's files, of a hub model in the cache; it may not exist yet."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else folder
