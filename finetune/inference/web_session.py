"""State and answers of the chat page: one conversation per browser tab, in one or two columns."""

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from html import unescape
from typing import Any

from finetune.conversation import Turn
from finetune.inference.answer_turns import ReasoningText, call_text, turn_text
from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import TOOL_COMMAND, ChatSession
from finetune.inference.generate import SamplingParams
from finetune.inference.load_result import BASE, TUNED

SECONDS_BETWEEN_UPDATES = 0.05
PENDING, EMPTY = "…", "∅"  # an answer that has not begun, and one without text
MARKDOWN_RULES = ("heading", "list", "fence", "code", "blockquote", "hr", "table", "emphasis", "strikethrough",
                  "backticks", "newline", "escape", "entity")  # fmt: skip
Messages = list[dict[str, Any]]
Pair = tuple[Sequence[Turn], Turn | None]  # what was asked, and the answer so far


@dataclass
class WebSession:
    """State of one browser tab."""

    chat: ChatSession = field(default_factory=ChatSession)
    base_answers: list[Turn | None] = field(default_factory=list)  # for each question of `chat`; None: it was not asked
    attempt: int = 0  # answers so far, including those that were undone
    stopped: bool = False  # the answer that is being generated should end
    resets: int = 0  # of the conversation; an answer to an earlier one is not kept

    def add(self, asked: Sequence[Turn], answer: Turn, base_answer: Turn | None) -> None:
        """Append what was asked with its answers."""
        self.chat.add(asked, answer)
        self.base_answers.append(base_answer)

    def undo(self) -> str | None:
        """Remove the last message from both columns and return it."""
        if not self.chat.results:
            del self.base_answers[-1:]
        return self.chat.undo()

    def reset(self) -> None:
        """Start a new conversation."""
        self.stopped = True
        self.resets += 1
        self.base_answers.clear()
        self.chat.reset()

    def columns(
        self, asked: Sequence[Turn] = (), answers: Mapping[str, Turn | None] | None = None
    ) -> tuple[Messages, Messages]:
        """Return the messages of both columns, including those that are being answered.

        `answers` has the answer so far of each model; the model whose answers are kept comes first.
        """
        kept: list[Pair] = [*self.chat.pairs]
        base: list[Pair] = [
            (before, answer)
            for (before, _), answer in zip(self.chat.pairs, self.base_answers, strict=True)
            if answer is not None
        ]
        if asked and answers:
            kept.append((asked, next(iter(answers.values()))))
            base += [(asked, answers[BASE])] if len(answers) > 1 else []
        elif self.chat.results:
            kept.append((self.chat.results, None))
        return _messages(kept), _messages(base)


class WebAnswers:
    """Generates the answers of all tabs, which share one model: one answer at a time."""

    def __init__(self, models: ChatModels) -> None:
        self.models = models
        self.kept = models.names[0]
        self.can_compare = self.kept == TUNED and models.loaded.result.is_trained
        self._lock = threading.Lock()

    def stream(
        self, session: WebSession, message: str, *, compares: bool, sampling: SamplingParams
    ) -> Iterator[tuple[Messages, Messages]]:
        """Yield both columns repeatedly while the answers are generated, then add them to the session."""
        answers: dict[str, Turn | None] = {}
        session.stopped, resets = False, session.resets
        asked = session.chat.asked(message)
        turns = session.chat.turns(asked)
        names = ([self.kept, BASE] if compares and self.can_compare else [self.kept]) if asked else []
        with self._lock:
            try:
                for name in names:
                    if not session.stopped:
                        for answer in self._answers(session, name, turns, sampling):
                            answers[name] = answer
                            yield session.columns(asked, answers)
            finally:
                session.attempt += 1
                kept = answers.get(self.kept)
                if kept and turn_text(kept) and session.resets == resets:
                    session.add(asked, kept, answers.get(BASE) if len(names) > 1 else None)
        yield session.columns()

    def _answers(
        self, session: WebSession, name: str, turns: list[Turn], sampling: SamplingParams
    ) -> Iterator[Turn | None]:
        """Yield an answer so far, repeatedly; last the whole."""
        yield None
        with self.models.stream(
            name, turns, tools=session.chat.tools, attempt=session.attempt, sampling=sampling
        ) as stream:
            text, reasoning, last_update, pieces = "", "", 0.0, iter(stream)
            for piece in pieces:
                if isinstance(piece, ReasoningText):
                    reasoning += piece
                else:
                    text += piece
                if session.stopped:
                    break
                if time.monotonic() - last_update >= SECONDS_BETWEEN_UPDATES:
                    yield Turn("model", text, reasoning=reasoning)
                    last_update = time.monotonic()
            pieces.close()
            yield stream.turn


def _messages(pairs: Sequence[Pair]) -> Messages:
    messages: Messages = []
    for asked, answer in pairs:
        texts = [turn.text if turn.role == "human" else TOOL_COMMAND + turn.text for turn in asked]
        messages += [{"role": "user", "content": as_html(text)} for text in texts]
        if answer is not None and answer.reasoning:
            title = {"title": "Reasoning", "status": "done"}  # done: it is folded
            messages.append({"role": "assistant", "content": as_html(answer.reasoning.strip()), "metadata": title})
        if answer is None or not answer.tool_calls or answer.text:
            text = PENDING if answer is None else answer.text or EMPTY
            messages.append({"role": "assistant", "content": as_html(text)})
        for call in answer.tool_calls if answer is not None else ():
            code = f"<div><pre><code>{spelled(call_text(call))}</code></pre></div>"
            messages.append({"role": "assistant", "content": code})
    return messages


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
