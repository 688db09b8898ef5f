"""`finetune chat` with a pipe: one question on stdin, its answer on stdout."""

import json
import logging
from typing import TextIO

from finetune.conversation import to_row
from finetune.inference.answer_turns import ReasoningText, call_text
from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import ChatSession
from finetune.utils.errors import ConfigError

logger = logging.getLogger(__name__)


def read_question(pipe: TextIO | None) -> str:
    """Read everything from a pipe as one human turn."""
    try:
        question = (pipe.buffer.read() if pipe else b"").decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 at byte {error.start}") from None
    if not question.strip():
        raise ConfigError("standard input is empty: expected a question, or a terminal to ask on")
    return question


def answer_once(models: ChatModels, chat: ChatSession, question: str, *, as_json: bool) -> None:
    """Print the answer while it is generated; of two models each below its name; as JSON at the end."""
    answers = {}
    has_names = len(models.names) > 1
    turns = chat.turns(chat.asked(question))
    for name in models.names:
        with models.stream(name, turns, tools=chat.tools) as answer:
            if has_names and not as_json:
                print(f"{name}:")
            for piece in answer:
                if not as_json and not isinstance(piece, ReasoningText):
                    print(piece, end="", flush=True)
        turn = answer.turn
        if not as_json:
            print(flush=True)
            for call in turn.tool_calls:
                logger.info(f"a call: {call_text(call)}")
        if not answer.ended:
            logger.warning(f"cut off at {len(answer.ids):,} tokens, see --max_new_tokens")
        values = to_row([turn])["conversations"][0]
        beside = {key: values[key] for key in ("reasoning", "tool_calls") if key in values}
        answers[name] = {"answer": turn.text, **beside, "ended": answer.ended, "tokens": len(answer.ids)}
    if as_json:
        print(json.dumps(answers if has_names else answers[models.names[0]], ensure_ascii=False))
