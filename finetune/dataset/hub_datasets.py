"""Data sets by name: saved with `datasets`, or from the Hugging Face hub."""

import os
from typing import Any

from finetune.utils.errors import DataError, first_line
from finetune.utils.hub import hub_errors, use_cache_if_hub_unreachable


def is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    has_state, has_info, has_splits = (
        os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_info.json", "dataset_dict.json")
    )
    return (has_state and has_info) or has_splits


def saved_dataset(folder: str) -> Any:
    """Load the `datasets.Dataset` in a folder; of several splits, `train`."""
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"{folder}: the saved data set does not load: {first_line(error)}") from None
    return _single_split(loaded, folder, f"name the folder of one, for example {folder}/")


def hub_dataset(given: str, name: str, config: str | None, split: str | None) -> Any:
    """Load a `datasets.Dataset` from the Hugging Face hub (`HF_ENDPOINT` is honoured), or from its cache."""
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants

    try:
        use_cache_if_hub_unreachable()
        loaded = datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise DataError(
            f"{given}: there is no such file, and the hub at {constants.ENDPOINT} cannot be reached: set HF_ENDPOINT "
            f"to a mirror, or download the data set elsewhere and name the local copy ({first_line(error)})"
        ) from None
    except (*hub_errors(), ValueError, RuntimeError, KeyError, pyarrow.ArrowException, DatasetsError) as error:
        remedy = "check the connection and the name: owner/name, owner/name:split or owner/name:config/split"
        if "scripts are no longer supported" in str(error):
            remedy = "download its data files and name them"
        raise DataError(f"{given}: the data set cannot be loaded from the hub: {first_line(error)}: {remedy}") from None
    return _single_split(loaded, given, f"name one, for example {name}:{f'{config}/' if config else ''}")


def _single_split(loaded: Any, given: str, remedy: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    names = ", ".join(loaded) or "none"
    example = next(iter(loaded), "train")
    raise DataError(f"{given}: expected a split called train, or one alone, found {names}: {remedy}{example}")
