"""What `--data_path` names: files, folders, globs, saved data sets, names on a hub, each with a weight or without."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.dataset.data_files import REFUSED_SUFFIXES
from finetune.dataset.hub_datasets import hub_dataset, is_saved, modelscope_folder, saved_dataset
from finetune.utils.errors import DataError, format_faults

NOT_SHIPPED = {"coig_10k.json": "COIG's 10,000 conversations are not part of this project"}
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
PACKED_SUFFIXES = (".gz", ".zst")
MODELSCOPE = "modelscope:"
# owner/name, then :split or :config/split
_HUB_NAME = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(:((?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Source:
    """One file or data set: `name` is what messages call it, `path` where it lies if that is somewhere else.

    With weight 2 all of its rows come twice an epoch, with 0.5 half of them. `dataset` is a `datasets.Dataset`.
    """

    name: str
    weight: float = 1.0
    path: str | None = None
    dataset: Any = field(default=None, repr=False, compare=False)

    @property
    def place(self) -> str:
        return self.path or self.name

    @cached_property
    def num_bytes(self) -> int:
        """Size on disk, packed as it is; of a data set, in memory. 0 where there is nothing any more."""
        if self.dataset is not None:
            return self.dataset.data.nbytes
        try:
            return os.path.getsize(self.place)
        except OSError:
            return 0


def find_sources(paths: str | Path | Sequence[str | Path]) -> list[Source]:
    """The files and data sets that the names stand for, in that order; a folder's and a glob's sorted by name.

    Raises:
        DataError: what is missing, empty, named twice or not to be had, and bad weights, all together.
    """
    sources: list[Source] = []
    faults: list[str] = []
    seen: dict[Any, str] = {}
    for given in [paths] if isinstance(paths, str | Path) else paths:
        try:
            found = _found(str(given))
        except DataError as error:
            faults.append(str(error))
            continue
        for source in found:
            before = seen.setdefault(_identity(source), source.name)
            if any(source.name == other.name for other in sources) or before != source.name:
                faults.append(f"{source.name}: is named twice" + (f", as {before} too" if before != source.name else "")
                              + ": leave one out, or give it a weight, as in data.json:2")  # fmt: skip
            else:
                sources.append(source)
    if faults:
        raise DataError(format_faults(faults, "fault"))
    return sources


def _identity(source: Source) -> Any:
    if source.dataset is not None:
        return source.name
    status = os.stat(source.place)
    return status.st_dev, status.st_ino


def _found(given: str) -> list[Source]:
    name, weight = _weighed(given)
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name, weight)
    if os.path.isfile(name):
        return [_file(name, weight)]
    if os.path.isdir(name):
        return [Source(name, weight, dataset=saved_dataset(name))] if is_saved(name) else _folder(name, weight)
    if glob.has_magic(name):
        return _globbed(name, weight)
    hub = _HUB_NAME.fullmatch(name)
    if hub and not os.path.isdir(name.partition("/")[0]) and not _is_data_file(hub["name"]):
        return [Source(name, weight, dataset=hub_dataset(name, hub["name"], hub["config"], hub["split"]))]
    raise DataError(f"{name}: {_why_missing(Path(name))}")


def _weighed(given: str) -> tuple[str, float]:
    """A name and the number behind its last colon, unless the whole is a file."""
    name, colon, number = given.rpartition(":")
    if not (colon and name) or os.path.exists(given):
        return given, 1.0
    try:
        weight = float(number)
    except ValueError:
        return given, 1.0
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{given}: expected a weight above 0 behind the colon, found {number}")
    return name, weight


def _is_data_file(name: str) -> bool:
    for suffix in PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.lower().endswith(DATA_SUFFIXES)


def _file(name: str, weight: float) -> Source:
    refused = next((reason for suffix, reason in REFUSED_SUFFIXES.items() if name.lower().endswith(suffix)), None)
    if name.lower().endswith((".tar.gz", ".tar.zst")):
        refused = REFUSED_SUFFIXES[".tar"]
    if refused is not None:
        raise DataError(f"{name}: {refused}")
    return Source(name, weight)


def _folder(folder: str, weight: float) -> list[Source]:
    inside = sorted(os.listdir(folder))
    files = [os.path.join(folder, one) for one in inside if _is_data_file(one) and not one.startswith(".")]
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        found = ", ".join(inside[:8]) or "nothing"
        raise DataError(
            f"{folder}: the folder holds no data: expected files that end in {', '.join(DATA_SUFFIXES)} "
            f"(or these with {' or '.join(PACKED_SUFFIXES)}), found {found}; folders in it are not looked into"
        )
    return [Source(file, weight) for file in files]


def _globbed(pattern: str, weight: float) -> list[Source]:
    files = [file for file in sorted(glob.glob(pattern)) if os.path.isfile(file)]
    if not files:
        raise DataError(f"{pattern}: no file matches")
    return [_file(file, weight) for file in files]


def _from_modelscope(given: str, weight: float) -> list[Source]:
    name = given.removeprefix(MODELSCOPE)
    if not _HUB_NAME.fullmatch(name) or ":" in name:
        raise DataError(f"{given}: expected modelscope:owner/name")
    folder = modelscope_folder(given, name)
    files = _folder(folder, weight)
    return [Source(f"{given}/{os.path.relpath(file.name, folder)}", weight, file.name) for file in files]


def _why_missing(path: Path) -> str:
    shipped = ", ".join(str(file) for file in shipped_files()) or "none in this installation"
    reason = NOT_SHIPPED.get(path.name, "there is no such file")
    return f"{reason}; conversations that come with it: {shipped}"


def shipped_files() -> list[Path]:
    """The conversation files of this project."""
    return [
        path for path in (shipped_folder() / name for name in ("identity.json", "conversations.json")) if path.is_file()
    ]


def shipped_folder() -> Path:
    """The data of this project: beside the package in a clone, inside it once installed."""
    package = Path(__file__).resolve().parent.parent
    return package / "data" if (package / "data").is_dir() else package.parent / "data"


def fingerprint_sources(sources: Sequence[Source]) -> str:
    """A hex digest of what the data holds, in the order of the sources, whatever they are called.

    Raises:
        DataError: a file cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    for source in sources:
        if source.dataset is not None:
            whole.update(b"dataset " + source.dataset._fingerprint.encode())
        else:
            whole.update(b"file " + _file_digest(source))
    return whole.hexdigest()


def _file_digest(source: Source) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    block = memoryview(bytearray(_BLOCK_BYTES))
    try:
        with open(source.place, "rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from None
    return digest.digest()
