"""Data sets by name: saved with `datasets`, on the Hugging Face hub, on ModelScope."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

from finetune.utils.errors import DataError

SECONDS_TO_ANSWER = 3.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
MODELSCOPE_INSTALL = "pip install 'modelscope>=1.18'"


def is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    has = {
        name for name in ("state.json", "dataset_info.json", "dataset_dict.json") if os.path.isfile(f"{folder}/{name}")
    }
    return has >= {"state.json", "dataset_info.json"} or "dataset_dict.json" in has


def saved_dataset(folder: str) -> Any:
    """The `datasets.Dataset` in a folder; of several splits, `train`.

    Raises:
        DataError: it cannot be loaded, or has several splits and none is called train.
    """
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"{folder}: the saved data set does not load: {_first_line(error)}") from None
    return _one_split(loaded, folder, f"name the folder of one, for example {folder}/")


def hub_dataset(given: str, name: str, config: str | None, split: str | None) -> Any:
    """A `datasets.Dataset` from the Hugging Face hub (`HF_ENDPOINT` is honoured), or from the cache without one.

    Raises:
        DataError: the hub cannot be reached, has no such data set, split or configuration.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _cache_alone_where_the_hub_is_silent():
            loaded = datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise DataError(
            f"{given}: there is no such file, and the hub at {constants.ENDPOINT} cannot be reached: set HF_ENDPOINT "
            f"to a mirror, or download the data set elsewhere and name the local copy ({_first_line(error)})"
        ) from None
    # The bases of HfHubHTTPError are what the hub's HTTP client raises, whichever that is.
    except (
        *HfHubHTTPError.__bases__,
        ValueError,
        RuntimeError,
        KeyError,
        pyarrow.ArrowException,
        DatasetsError,
    ) as error:
        remedy = "check the connection and the name: owner/name, owner/name:split or owner/name:config/split"
        if "scripts are no longer supported" in str(error):
            remedy = "download its data files and name them"
        raise DataError(f"{given}: the data set on the hub cannot be had: {_first_line(error)}: {remedy}") from None
    return _one_split(loaded, given, f"name one, for example {name}:{f'{config}/' if config else ''}")


def modelscope_folder(given: str, name: str) -> str:
    """The local folder with the files of a data set on ModelScope, downloaded where they are not there yet.

    Raises:
        DataError: the `modelscope` package is missing, or the data set cannot be had.
    """
    if importlib.util.find_spec("modelscope") is None:
        raise DataError(f"{given}: data sets on ModelScope need a package that is missing: {MODELSCOPE_INSTALL}")
    from modelscope.hub.snapshot_download import dataset_snapshot_download

    try:
        return dataset_snapshot_download(name)
    except (OSError, ValueError, RuntimeError, *_modelscope_errors()) as error:
        raise DataError(
            f"{given}: the data set on ModelScope cannot be had: {_first_line(error)}: check the name and the "
            "connection, or download it elsewhere and name the local copy"
        ) from None


def _modelscope_errors() -> tuple[type[Exception], ...]:
    """The package's own errors, which have no common parent in every version."""
    from modelscope.hub import errors

    return tuple(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))


def _one_split(loaded: Any, given: str, remedy: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    names = ", ".join(loaded) or "none"
    example = next(iter(loaded), "train")
    raise DataError(f"{given}: expected a split called train, or one alone, found {names}: {remedy}{example}")


@contextmanager
def _cache_alone_where_the_hub_is_silent() -> Iterator[None]:
    """The client would retry for half a minute an address that does not answer, before it looks in the cache."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not any(os.environ.get(variable) for variable in PROXIES) and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    parts = urlparse(address)
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), SECONDS_TO_ANSWER):
            return True
    except (OSError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
