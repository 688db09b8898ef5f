"""What the page in a browser does: questions answered in one or two columns, for each tab a conversation of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune.inference.chat_models import ChatModels
from finetune.inference.chat_session import ChatSession
from finetune.inference.generate import SamplingParams
from finetune.inference.load_result import BASE, TUNED
from finetune.inference.web_strings import as_markdown

SECONDS_BETWEEN_UPDATES = 0.05
WAITING, NOTHING = "…", "∅"  # an answer that has not begun, and one that was empty
Messages = list[dict[str, str]]


@dataclass
class WebSession:
    """What one browser tab holds.

    Attributes:
        compared: for each kept question what the base answered; None where it was not asked.
        take: answers so far, also those that were taken back.
        stopped: the answer that is coming shall end.
        resets: how often the conversation was begun anew: an answer to an earlier one is not kept.
    """

    chat: ChatSession = field(default_factory=ChatSession)
    compared: list[str | None] = field(default_factory=list)
    take: int = 0
    stopped: bool = False
    resets: int = 0

    def keep(self, question: str, said: str, compared: str | None) -> None:
        """An answer has been given, in one column or both."""
        self.chat.keep(question, said)
        self.compared.append(compared)

    def undo(self) -> str | None:
        """Forget the last question in both columns; it is returned."""
        del self.compared[-1:]
        return self.chat.undo()

    def reset(self) -> None:
        """Begin anew."""
        self.stopped = True
        self.resets += 1
        self.compared.clear()
        self.chat.reset()

    def columns(self, question: str | None = None, said: dict[str, str] | None = None) -> tuple[Messages, Messages]:
        """The messages of the kept voice and of the base, those of a question that is being answered included."""
        kept = list(self.chat.pairs)
        asked = [question for question, _ in kept]
        compared = [(one, answer) for one, answer in zip(asked, self.compared, strict=True) if answer is not None]
        if question is not None and said:
            kept.append((question, next(iter(said.values())) or WAITING))
            compared += [(question, said[BASE] or WAITING)] if len(said) > 1 else []
        return _messages(kept), _messages(compared)


class WebAnswers:
    """The answers; all tabs share one model, and wait for each other."""

    def __init__(self, voices: ChatModels) -> None:
        self.voices = voices
        self.kept = voices.names[0]
        self.can_compare = self.kept == TUNED and voices.opened.result.is_trained
        self._turn = threading.Lock()

    def answer(
        self, session: WebSession, question: str, *, compares: bool, tokens: int, sampling: SamplingParams
    ) -> Iterator[tuple[Messages, Messages]]:
        """Both columns, again and again while answers come; then they are kept in the session.

        Raises:
            FinetuneError: the conversation is too long, the base is not there, the model failed.
        """
        said: dict[str, str] = {}
        session.stopped, resets = False, session.resets
        turns = session.chat.asking(question)
        names = [self.kept, BASE] if compares and self.can_compare else [self.kept]
        with self._turn:
            try:
                for name in names:
                    if not session.stopped:
                        for text in self._text(session, name, turns, tokens, sampling):
                            said[name] = text
                            yield session.columns(question, said)
            finally:
                session.take += 1
                if said.get(self.kept) and session.resets == resets:
                    session.keep(question, said[self.kept], said.get(BASE) if len(names) > 1 else None)
        yield session.columns()

    def _text(
        self, session: WebSession, name: str, turns: list, tokens: int, sampling: SamplingParams
    ) -> Iterator[str]:
        """An answer so far, again and again; at last as it is kept."""
        yield ""
        with self.voices.speaking(
            name, turns, take=session.take, max_new_tokens=tokens, sampling=sampling
        ) as answering:
            shown, last, pieces = "", 0.0, iter(answering)
            for piece in pieces:
                shown += piece
                if session.stopped:
                    break
                if time.monotonic() - last >= SECONDS_BETWEEN_UPDATES:
                    yield shown
                    last = time.monotonic()
            pieces.close()
            yield answering.text


def _messages(pairs: list[tuple[str, str]]) -> Messages:
    return [
        {"role": role, "content": as_markdown(text)}
        for asked, said in pairs
        for role, text in (("user", asked), ("assistant", said or NOTHING))
    ]
