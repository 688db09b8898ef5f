"""One question from a pipe, its answer on stdout."""

from __future__ import annotations

import json
import logging
from typing import TextIO

from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import ChatSession
from finetune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def read_question(pipe: TextIO | None) -> str:
    """All that comes through a pipe, as one human turn.

    Raises:
        ConfigError: nothing came, or what came is not UTF-8.
    """
    try:
        question = (pipe.buffer.read() if pipe else b"").decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input, byte {error.start}: is not UTF-8") from None
    if not question.strip():
        raise ConfigError("standard input is empty: expected a question, or a terminal to ask on")
    return question


def answer_once(voices: ChatModels, chat: ChatSession, question: str, *, as_json: bool) -> None:
    """Print the answer as it comes; with two voices each behind its name, as JSON all at the end."""
    answers = {}
    for name in voices.names:
        with voices.speaking(name, chat.asking(question)) as answering:
            if len(voices.names) > 1 and not as_json:
                print(f"{name}:")
            for piece in answering:
                if not as_json:
                    print(piece, end="", flush=True)
            answers[name] = answering
        if not as_json:
            print(flush=True)
        if not answering.ended:
            logger.warning(f"cut off at {len(answering.ids):,} tokens, see --max_new_tokens")
    if as_json:
        said = {name: {"answer": one.text, "ended": one.ended, "tokens": len(one.ids)} for name, one in answers.items()}
        print(json.dumps(said if len(said) > 1 else said[voices.names[0]], ensure_ascii=False))
