"""From what the command line names to proven examples: the tokenizer, the chat format, the data. Needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.chat_templates import ChatFormat, Renderer, add_control_tokens, select_chat_format
from finetune.config import DataArguments, ModelArguments
from finetune.dataset.data_sources import Source, find_sources
from finetune.dataset.prepare import PreparedData, prepare_dataset
from finetune.distributed.startup_timer import timed
from finetune.models import loader

logger = logging.getLogger(__name__)


def load_chat_format(chosen: ModelArguments, data: DataArguments) -> tuple[Any, ChatFormat, list[str]]:
    """The tokenizer with new tokens added, the chat format of the run, and lines for the user."""
    tokenizer = loader.load_tokenizer(
        chosen.model_name_or_path, revision=chosen.model_revision, trust_remote_code=chosen.trusts_code()
    )
    add_control_tokens(tokenizer, chosen.new_tokens)
    chat_format, notes = select_chat_format(
        tokenizer,
        data.chat_template,
        human_token_ids=data.human_token_ids,
        model_token_ids=data.model_token_ids,
        is_lingowhale=chosen.is_lingowhale(),
        content_tokens=data.content_tokens,
    )
    return tokenizer, chat_format, notes


@timed("data")
def prepare_data(chosen: ModelArguments, data: DataArguments) -> tuple[Any, ChatFormat, PreparedData]:
    """Return the tokenizer, the chat format, and all rows read, rendered and checked."""
    sources = find_sources(data.data_path)
    apart = find_sources(data.eval_data_path) if data.eval_data_path else None
    tokenizer, chat_format, notes = load_chat_format(chosen, data)
    for note in notes:
        logger.warning(note)
    evaluation = prepare_rows(apart, chat_format, data) if apart else None
    rows = prepare_rows(sources, chat_format, data)
    return tokenizer, chat_format, replace(rows, validation_share=data.validation_share, evaluation=evaluation)


def prepare_rows(sources: Sequence[Source], chat_format: ChatFormat, data: DataArguments) -> PreparedData:
    """All rows of these sources read, rendered as the flags say, and proven."""
    found = prepare_dataset(
        sources,
        Renderer(chat_format, data.model_max_length, too_long=data.too_long, train_on=data.train_on),
        bad_rows=data.bad_rows,
        repairs=data.repairs,
        cache_dir=data.data_cache_dir,
        num_processes=data.preprocessing_num_workers,
    )
    for line in found.notes:
        logger.warning(line)
    return found
