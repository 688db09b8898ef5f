"""What rendering makes: examples with their labels, and the layout they grow from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from finetune.chat_templates.labels import IGNORE_INDEX, UnrenderableError
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.conversation import Turn

Status = Literal["kept", "cut", "split", "dropped"]


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """Where a turn lies in an example: tokens `start` to `stop` (exclusive), its end-of-turn token included."""

    turn: int
    role: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SupervisedSpan:
    """One learned run of labels, `start` to `stop` (exclusive), and the `text` of the model turn that it must spell.

    The label at `stop - 1` is the token that ends the turn, unless the turn was cut (`ended` is False).
    """

    turn: int
    start: int
    stop: int
    text: str
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    `input_ids` and `labels` are lists of the same length; `labels[i]` is -100 or what position i should have been
    predicted as (position i-1 predicts it; position 0 is predicted by nothing and always -100). `row` and `source`
    say which conversation it is, `window` which part of it.
    """

    input_ids: list[int]
    labels: list[int]
    row: int
    source: str
    window: int = 0
    turn_spans: tuple[TurnSpan, ...] = ()

    @property
    def num_supervised(self) -> int:
        """Positions that are learned."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def supervised_turns_of(labels: Sequence[int], turns: Sequence[int], starts: Sequence[int]) -> np.ndarray:
    """The model turn that each learned token of an example belongs to, ints [learned].

        labels   -100 -100 Yes </s> -100 No  </s>     turns 1 and 3 start at 2 and 5: 1 1 3 3

    An end that is learned where the next turn begins belongs to the answer before it.

    Args:
        labels: ints [tokens].
        turns, starts: a number of each model turn and its first position, in the order of the tokens.
    """
    learned = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
    return np.asarray(turns)[np.searchsorted(starts, learned, side="right") - 1]


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """What became of one conversation: its examples (none when dropped) and, unless all is plain, the reason.

    `spelled` counts its turns that spell a control token, which stayed text.
    """

    row: int
    id: Any
    status: Status
    examples: tuple[Example, ...]
    reason: str | None = None
    source: str = ""
    spelled: int = field(default=0, compare=False)  # counted, not stored


@dataclass(slots=True)
class TokenizedConversation:
    """A conversation laid out as tokens; `rules` names what the format changed about it."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[TurnSpan] = field(default_factory=list)
    answers: list[SupervisedSpan] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    spelled: int = 0

    def add(self, ids: Sequence[int], *, learned: bool) -> None:
        """Append ids, all of them learned or all of them context."""
        self.input_ids += ids
        self.labels += ids if learned else [IGNORE_INDEX] * len(ids)

    def cut(self, length: int) -> TokenizedConversation:
        """The first `length` tokens; an answer that loses its end is no longer `ended`."""
        spans = [
            TurnSpan(one.turn, one.role, one.start, min(one.stop, length)) for one in self.spans if one.start < length
        ]
        answers = [
            SupervisedSpan(one.turn, one.start, min(one.stop, length), one.text, one.ended and one.stop <= length)
            for one in self.answers
            if one.start < length
        ]
        return TokenizedConversation(
            self.input_ids[:length], self.labels[:length], spans, answers, self.rules, self.spelled
        )

    @property
    def last_learned(self) -> int:
        """The number of tokens up to and including the last one that is learned; 0 when none is."""
        return max((answer.stop for answer in self.answers), default=0)


class ChatFormat(Protocol):
    """How turns become tokens."""

    name: str
    plain: PlainTextTokenizer

    def tokenize_all(self, rows: Sequence[Sequence[Turn]]) -> list[TokenizedConversation | UnrenderableError]:
        """Lay each row's turns out; where the format cannot express them, the refusal stands in its place."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides how turns are laid out, beside the tokenizer; JSON values."""
        ...


def tokenize_conversation(chat_format: ChatFormat, turns: Sequence[Turn]) -> TokenizedConversation:
    """Lay one conversation out.

    Raises:
        Unrenderable: the format cannot express it.
    """
    (layout,) = chat_format.tokenize_all([turns])
    if isinstance(layout, UnrenderableError):
        raise layout
    return layout
