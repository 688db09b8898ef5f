"""Resolve `--data_path`: files, folders, globs, saved data sets and names on a hub, each with an optional weight."""

import glob
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.dataset.csv_reader import DELIMITERS
from finetune.dataset.data_files import REFUSED_SUFFIXES
from finetune.dataset.hub_datasets import hub_dataset, is_saved, saved_dataset
from finetune.dataset.remote_files import check_address, fetch
from finetune.utils.errors import ConfigError, DataError, format_names, missing_reason, raise_faults
from finetune.utils.hub import MODELSCOPE, check_modelscope, modelscope_folder
from finetune.utils.proc import shipped_folder

NOT_SHIPPED = {"coig_10k.json": "COIG's 10,000 conversations are not part of this project"}
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
PACKED_SUFFIXES = (".gz", ".zst")
MODEL_FILES = {"config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "run.json"}
# owner/name, then :split or :config/split
_HUB_NAME = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(:((?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """One file or data set; `name` is for messages, `path` is the file if it differs from the name.

    With weight 2 all rows come twice per epoch, with 0.5 half of them. `dataset` is a `datasets.Dataset`. `columns` are
    pairs of a key of a format that is read and the column that stands for it.
    """

    name: str
    weight: float = 1.0
    path: str | None = None
    dataset: Any = field(default=None, repr=False, compare=False)
    columns: tuple[tuple[str, str], ...] = ()

    @property
    def location(self) -> str:
        """The path of the file."""
        return self.path or self.name

    @property
    def delimiter(self) -> str | None:
        """What separates the cells of a CSV or TSV file; None for other files."""
        name = self.location.lower()
        for suffix in PACKED_SUFFIXES:
            name = name.removesuffix(suffix)
        return DELIMITERS.get(os.path.splitext(name)[1])

    @cached_property
    def num_bytes(self) -> int:
        """Size on disk, compressed or not; of a data set, in memory. 0 if the file is gone."""
        if self.dataset is not None:
            return self.dataset.data.nbytes
        try:
            return os.path.getsize(self.location)
        except OSError:
            return 0


def find_sources(paths: str | Path | Sequence[str | Path], columns: Sequence[str] = ()) -> list[Source]:
    """Resolve names to files and data sets, in that order; those of a folder or a glob are sorted by name.

    Args:
        columns: `KEY=COLUMN`, the column that stands for a key of a format that is read.
    """
    pairs = tuple((key, column) for key, _, column in (pair.partition("=") for pair in columns))
    sources: list[Source] = []
    faults: list[str] = []
    seen: dict[Any, str] = {}
    for given in [paths] if isinstance(paths, str | Path) else paths:
        try:
            resolved = _resolve(str(given))
        except DataError as error:
            faults.append(str(error))
            continue
        for source in resolved:
            if source.name.encode("utf-8", "replace").decode() != source.name:
                faults.append(f"{ascii(source.name)}: the name is not UTF-8, as records of runs are: rename it")
                continue
            first_name = seen.setdefault(_identity(source), source.name)
            if any(source.name == other.name for other in sources) or first_name != source.name:
                alias = f", as {first_name} too" if first_name != source.name else ""
                faults.append(
                    f"{source.name}: is named twice{alias}: leave one out, or give it a weight, as in data.json:2"
                )
            else:
                sources.append(replace(source, columns=pairs))
    raise_faults(faults, DataError)
    return sources


def find_local_sources(training: Sequence[str], held_out: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of local files, once each is known to be there; addresses are checked without the network."""
    local = list(filter(is_local, training)), list(filter(is_local, held_out))
    for name, _ in map(_split_weight, (*training, *held_out)):
        if name.startswith(MODELSCOPE):
            check_modelscope(name, "data set", DataError)
        elif "://" in name:
            check_address(name)
    for names in local:
        find_sources(names)
    return local


def is_local(given: str) -> bool:
    """Return whether a name is one of files, which need neither a network nor a library."""
    name, _ = _split_weight(given)
    is_elsewhere = "://" in name or name.startswith(MODELSCOPE) or (os.path.isdir(name) and is_saved(name))
    return not is_elsewhere and (os.path.exists(name) or not _hub_name(name))


def _identity(source: Source) -> Any:
    if source.dataset is not None:
        return source.name
    status = os.stat(source.location)
    return status.st_dev, status.st_ino


def _resolve(given: str) -> list[Source]:
    name, weight = _split_weight(given)
    if name.startswith(MODELSCOPE):
        return _modelscope(name, weight)
    if "://" in name:
        return [replace(_file(url, weight), path=copy) for url, copy in fetch(name)]
    if os.path.isfile(name):
        return [_file(name, weight)]
    if os.path.isdir(name):
        return [Source(name, weight, dataset=saved_dataset(name))] if is_saved(name) else _folder(name, weight)
    if glob.has_magic(name):
        return _glob(name, weight)
    if hub := _hub_name(name):
        return [Source(name, weight, dataset=hub_dataset(name, hub["name"], hub["config"], hub["split"]))]
    raise DataError(f"{name}: {_why_missing(Path(name))}")


def _hub_name(name: str) -> re.Match[str] | None:
    hub = _HUB_NAME.fullmatch(name)
    return hub if hub and not os.path.isdir(name.partition("/")[0]) and not _is_data_file(hub["name"]) else None


def _split_weight(given: str) -> tuple[str, float]:
    """Split off the number after the last colon, unless the whole is a file; `~` is the home folder."""
    given = os.path.expanduser(given)
    name, colon, number = given.rpartition(":")
    if not (colon and name) or os.path.exists(given):
        return given, 1.0
    try:
        weight = float(number)
    except ValueError:
        if os.path.isfile(name):
            raise DataError(f"{given}: expected a number after the colon, the weight of {name}") from None
        return given, 1.0
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{given}: expected a weight above 0 after the colon, found {number}")
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
    """The data files of a folder and of those in it, but for folders of models and hidden ones."""
    files: list[str] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        of_model = sorted(MODEL_FILES.intersection(names))
        if of_model and place != folder:
            folders.clear()
            continue
        if of_model:
            raise ConfigError(
                f"{place}: is the folder of a model or a run, it holds {format_names(of_model)}: name files of "
                "conversations, or the folder that holds them"
            )
        if place != folder and is_saved(place):
            raise DataError(
                f"{place}: is a data set that save_to_disk wrote: name it by itself, not a folder around it"
            )
        data = sorted(name for name in names if _is_data_file(name) and not name.startswith("."))
        files += [file for file in (os.path.join(place, name) for name in data) if os.path.isfile(file)]
    if not files:
        found = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        raise DataError(
            f"{folder}: the folder holds no data: expected files that end in {', '.join(DATA_SUFFIXES)} "
            f"(or these with {' or '.join(PACKED_SUFFIXES)}), found {found}"
        )
    return [Source(file, weight) for file in files]


def _glob(pattern: str, weight: float) -> list[Source]:
    files = [file for file in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(file)]
    if not files:
        raise DataError(f"{pattern}: no file matches in {Path.cwd()}: correct the pattern or the path")
    return [_file(file, weight) for file in files]


def _modelscope(given: str, weight: float) -> list[Source]:
    folder = modelscope_folder(given, "data set", DataError)
    files = _folder(folder, weight)
    return [Source(f"{given}/{os.path.relpath(file.name, folder)}", weight, file.name) for file in files]


def _why_missing(path: Path) -> str:
    shipped = ", ".join(str(file) for file in shipped_files()) or "none in this installation"
    several = [part for part in re.split("[,，;；\\s]+", str(path)) if part]  # noqa: RUF001
    if len(several) > 1 and all(map(os.path.exists, several)):
        words, items = " ".join(several), ", ".join(several)
        return f"no file has this name: several are written with spaces between them: {words}; in a recipe as [{items}]"
    reason = NOT_SHIPPED.get(path.name) or missing_reason(path)
    return f"{reason}; conversations that come with it: {shipped}"


def shipped_files() -> list[Path]:
    """The conversation files of this project."""
    paths = [shipped_folder("data") / name for name in ("identity.json", "conversations.json")]
    return [path for path in paths if path.is_file()]


def fingerprint_sources(sources: Sequence[Source]) -> str:
    """A hex digest of the contents of the sources in their order, independent of their names."""
    fingerprint = hashlib.blake2b(digest_size=16)
    for source in sources:
        if source.dataset is not None:
            fingerprint.update(b"dataset " + source.dataset._fingerprint.encode())
        else:
            fingerprint.update(b"file " + _file_digest(source))
    return fingerprint.hexdigest()


def _file_digest(source: Source) -> bytes:
    try:
        with open(source.location, "rb", buffering=0) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).digest()
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from None
