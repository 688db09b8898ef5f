"""State and answers of the chat page: one conversation per browser tab, in one or two columns."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from html import unescape
from typing import Any

from finetune.conversation import Turn
from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import ChatSession
from finetune.inference.generate import SamplingParams
from finetune.inference.load_result import BASE, TUNED

SECONDS_BETWEEN_UPDATES = 0.05
PENDING, EMPTY = "…", "∅"  # an answer that has not begun, and one without text
MARKDOWN_RULES = ("heading", "list", "fence", "code", "blockquote", "hr", "table", "emphasis", "strikethrough",
                  "backticks", "newline", "escape", "entity")  # fmt: skip
Messages = list[dict[str, str]]


@dataclass
class WebSession:
    """State of one browser tab."""

    chat: ChatSession = field(default_factory=ChatSession)
    base_answers: list[str | None] = field(default_factory=list)  # for each question of `chat`; None: it was not asked
    attempt: int = 0  # answers so far, including those that were undone
    stopped: bool = False  # the answer that is being generated should end
    resets: int = 0  # of the conversation; an answer to an earlier one is not kept

    def add(self, question: str, answer: str, base_answer: str | None) -> None:
        """Append a question with its answers."""
        self.chat.add(question, answer)
        self.base_answers.append(base_answer)

    def undo(self) -> str | None:
        """Remove the last question from both columns and return it."""
        del self.base_answers[-1:]
        return self.chat.undo()

    def reset(self) -> None:
        """Start a new conversation."""
        self.stopped = True
        self.resets += 1
        self.base_answers.clear()
        self.chat.reset()

    def columns(self, question: str | None = None, answers: dict[str, str] | None = None) -> tuple[Messages, Messages]:
        """Return the messages of both columns, including a question that is being answered.

        `answers` has the answer so far of each model; the model whose answers are kept comes first.
        """
        kept = list(self.chat.pairs)
        base = [
            (asked, answer)
            for (asked, _), answer in zip(self.chat.pairs, self.base_answers, strict=True)
            if answer is not None
        ]
        if question is not None and answers:
            kept.append((question, next(iter(answers.values())) or PENDING))
            base += [(question, answers[BASE] or PENDING)] if len(answers) > 1 else []
        return _messages(kept), _messages(base)


class WebAnswers:
    """Generates the answers of all tabs, which share one model: one answer at a time."""

    def __init__(self, models: ChatModels) -> None:
        self.models = models
        self.kept = models.names[0]
        self.can_compare = self.kept == TUNED and models.loaded.result.is_trained
        self._lock = threading.Lock()

    def stream(
        self, session: WebSession, question: str, *, compares: bool, max_new_tokens: int, sampling: SamplingParams
    ) -> Iterator[tuple[Messages, Messages]]:
        """Yield both columns repeatedly while the answers are generated, then add them to the session."""
        answers: dict[str, str] = {}
        session.stopped, resets = False, session.resets
        turns = session.chat.turns(question)
        names = [self.kept, BASE] if compares and self.can_compare else [self.kept]
        with self._lock:
            try:
                for name in names:
                    if not session.stopped:
                        for text in self._texts(session, name, turns, max_new_tokens, sampling):
                            answers[name] = text
                            yield session.columns(question, answers)
            finally:
                session.attempt += 1
                if answers.get(self.kept) and session.resets == resets:
                    session.add(question, answers[self.kept], answers.get(BASE) if len(names) > 1 else None)
        yield session.columns()

    def _texts(
        self, session: WebSession, name: str, turns: list[Turn], max_new_tokens: int, sampling: SamplingParams
    ) -> Iterator[str]:
        """Yield an answer so far, repeatedly; last its final text."""
        yield ""
        with self.models.stream(
            name, turns, attempt=session.attempt, max_new_tokens=max_new_tokens, sampling=sampling
        ) as stream:
            text, last_update, pieces = "", 0.0, iter(stream)
            for piece in pieces:
                text += piece
                if session.stopped:
                    break
                if time.monotonic() - last_update >= SECONDS_BETWEEN_UPDATES:
                    yield text
                    last_update = time.monotonic()
            pieces.close()
            yield stream.text


def _messages(pairs: list[tuple[str, str]]) -> Messages:
    return [
        {"role": role, "content": as_html(text)}
        for question, answer in pairs
        for role, text in (("user", question), ("assistant", answer or EMPTY))
    ]


@lru_cache(maxsize=512)
def as_html(text: str) -> str:
    """Render Markdown to one line of HTML that can neither run nor fetch anything, whatever reads it again.

    Only the rules in `MARKDOWN_RULES` act: no link, no image, no HTML. Each character that could mean something to
    another parser of Markdown, formulas or HTML is a numeric reference.
    """
    parts = re.split(r"(<[^>]*>)", _markdown().render(text))
    return f"<div>{''.join(part if part.startswith('<') else spelled(unescape(part)) for part in parts)}</div>"


def spelled(text: str) -> str:
    """Write text with a numeric reference for each character that is not a letter, a digit or a space."""
    text = text.removeprefix("\n")  # after a tag
    return "".join(char if char.isalnum() or char == " " else f"&#{ord(char)};" for char in text)


@cache
def _markdown() -> Any:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML

    markdown = MarkdownIt("zero", {"html": False, "breaks": True}).enable(list(MARKDOWN_RULES))
    markdown.add_render_rule("fence", RendererHTML.code_block)  # without the language, which may start a script
    return markdown
