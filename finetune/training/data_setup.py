"""Prepare the data of a run as the command line describes it: tokenizer, chat format, examples. Needs no torch.

`load_data` checks and shows what `prepare_run_data` prepares: training and held-out data, each by `prepare_sources`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import ChatFormat, RenderedConversation, Renderer, add_control_tokens, select_chat_format
from finetune.config import DataArguments, ModelArguments
from finetune.dataset.data_sources import Source, find_sources
from finetune.dataset.prepare import PreparedData, check_dropped_share, prepare_dataset
from finetune.models import loader
from finetune.utils.console import log_notes, section
from finetune.utils.errors import SHOWN_FAULTS, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_chat_format(
    model: ModelArguments, data: DataArguments, day: date | None = None
) -> tuple[PreTrainedTokenizerBase, ChatFormat, list[str]]:
    """Load the tokenizer, add its new tokens and select the chat format; also return notes for the user."""
    name, revision, trusts_code = model.tokenizer_source()
    tokenizer = loader.load_tokenizer(name, revision=revision, trust_remote_code=trusts_code)
    add_control_tokens(tokenizer, model.new_tokens)
    chat_format, notes = select_chat_format(
        tokenizer,
        data.chat_template,
        data.chat_settings(),
        is_lingowhale=model.is_lingowhale(),
        day=day,
    )
    return tokenizer, chat_format, notes


def load_data(
    model: ModelArguments, data: DataArguments, day: date | None = None
) -> tuple[PreTrainedTokenizerBase, ChatFormat, PreparedData]:
    """Prepare the data, show its summary, and refuse data that the run should not start with."""
    tokenizer, chat_format, prepared = prepare_run_data(model, data, day)
    for part, title in ((prepared, "Data"), (prepared.evaluation, "Held-out data")):
        if part is not None:
            logger.info(section(title, part.summary.lines()))
    check_data(prepared, data)
    return tokenizer, chat_format, prepared


def check_data(prepared: PreparedData, data: DataArguments) -> None:
    """Check the shares of bad rows, and that no held-out example is a training example.

    Raises:
        DataError: a run should not start with this data.
    """
    for part in filter(None, (prepared, prepared.evaluation)):
        check_dropped_share(part, data.max_dropped_rows)
    seen = prepared.seen_held_out()
    if seen and prepared.evaluation is not None:
        count = f"{len(seen):,} of {prepared.evaluation.summary.examples:,} examples of --eval_data_path are training "
        if data.allow_seen_held_out:
            logger.warning(f"{count}examples, too: the held-out loss says less about new conversations")
            return
        places = [f"{prepared.evaluation.place(held)} = {prepared.place(index)}" for held, index in seen[:SHOWN_FAULTS]]
        raise DataError(
            f"{count}examples: take them out of one of the two, or allow them with --allow_seen_held_out True\n"
            + "\n".join(f"  {place}" for place in [*places, *["..."] * (len(seen) > SHOWN_FAULTS)])
        )


def prepare_run_data(
    model: ModelArguments,
    data: DataArguments,
    day: date | None = None,
    *,
    limit: int | None = None,
    watch: Callable[[ChatFormat, Iterator[RenderedConversation]], None] | None = None,
) -> tuple[PreTrainedTokenizerBase, ChatFormat, PreparedData]:
    """Return tokenizer, chat format and data, the first `limit` rows of each; `watch` is that of `prepare_dataset`."""
    sources = find_sources(data.data_path, data.columns)
    held_out_sources = find_sources(data.eval_data_path, data.columns) if data.eval_data_path else None
    tokenizer, chat_format, notes = load_chat_format(model, data, day)
    log_notes(notes)
    shown = watch and partial(watch, chat_format)
    prepared = prepare_sources(sources, chat_format, data, limit=limit, watch=shown)
    evaluation = prepare_sources(held_out_sources, chat_format, data, limit=limit) if held_out_sources else None
    prepared = replace(
        prepared, validation_share=data.validation_share, evaluation=evaluation, day=chat_format.identity().get("day")
    )
    return tokenizer, chat_format, prepared


def prepare_sources(
    sources: Sequence[Source], chat_format: ChatFormat, data: DataArguments, **options: Any
) -> PreparedData:
    """Read, render and check the rows of these sources as the flags say; `options` are those of `prepare_dataset`."""
    prepared = prepare_dataset(
        sources,
        Renderer(
            chat_format,
            data.model_max_length,
            too_long=data.too_long,
            train_on=data.train_on,
            drops_reasoning=data.reasoning == "drop",
        ),
        bad_rows=data.bad_rows,
        repairs=data.repairs,
        cache_dir=data.data_cache_dir,
        num_processes=data.preprocessing_num_workers,
        **options,
    )
    log_notes(prepared.notes)
    return prepared
