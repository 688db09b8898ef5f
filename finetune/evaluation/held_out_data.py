"""Held-out conversations, read and rendered as the training did."""

from __future__ import annotations

import logging
from typing import Any

from finetune.config import DataArguments
from finetune.dataset.data_sources import find_sources
from finetune.dataset.prepare import PreparedData, check_dropped_share
from finetune.inference.load_result import chat_format_of, load_tokenizer
from finetune.inference.run_result import RunResult
from finetune.training.data_setup import prepare_sources

logger = logging.getLogger(__name__)

# How conversations are rendered is the training's choice, unless it is given.
OF_THE_TRAINING = ("model_max_length", "too_long", "train_on", "repairs")


def data_arguments(result: RunResult, given: dict[str, Any]) -> DataArguments:
    """The flags that were given, and beside them those that the training had."""
    trained = result.run.get("arguments", {})
    known = {name: trained[name] for name in OF_THE_TRAINING if trained.get(name) is not None}
    return DataArguments(**{**known, **given})


def prepare_held_out(result: RunResult, given: dict[str, Any]) -> PreparedData:
    """All rows read, rendered and proven by the pipeline that trains.

    Raises:
        DataError: rows with faults, or none that is left.
    """
    data = data_arguments(result, given)
    tokenizer = load_tokenizer(result)
    sources = find_sources(data.data_path)
    weighted = [source.name for source in sources if source.weight != 1]
    if weighted:
        logger.warning(f"every row is measured once: the weight of {weighted[0]} has no meaning here")
    prepared = prepare_sources(sources, chat_format_of(result, tokenizer), data)
    check_dropped_share(prepared, data.max_dropped_rows)
    return prepared
