"""Tokenized conversations with labels, training examples, and the interface of chat formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from finetune.chat_templates.plain_text import PlainTextTokenizer, UnrenderableError
from finetune.conversation import Conversation, Turn

IGNORE_INDEX = -100
Status = Literal["kept", "cut", "split", "dropped"]

# Rules by which a format may change a conversation; each use is written to the ledger.
SYSTEM_RULE = "system turn put in front of the first human turn"
STRIPPED_RULE = "the chat template strips white space around answers"
REASONING_RULE = "the chat template leaves out the reasoning of turn {turn}"
OPENED_RULE = "the reasoning of turn {turn}, of which only the end is given, is opened with <think>"
WORDS_RULE = "the chat template looks for words such as /no_think, which a human or system turn has"
SYSTEM_SEPARATOR = "\n\n"


def system_in_front(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Apply `SYSTEM_RULE`: prepend the text of the system turn to the human turn after it."""
    system, first, *others = turns
    return (replace(first, text=system.text + SYSTEM_SEPARATOR + first.text), *others)


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """The tokens of a turn in an example: `start` to `stop` (exclusive), including its end-of-turn token.

    `note` says for display what else a model turn holds: "reasoning", "calls get_weather".
    """

    turn: int
    role: str
    start: int
    stop: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class SupervisedSpan:
    """A run of supervised labels, `start` to `stop` (exclusive), which must decode to `text`.

    The last `num_end` labels are end-of-turn tokens; there are none if the turn was truncated. `content` is the model
    turn where the template writes more than its text (an opening, reasoning, tool calls); the labels must hold it, too.
    `openings` is what stands in front of what the data say, and whether that is supervised.
    """

    turn: int
    start: int
    stop: int
    text: str
    num_end: int = 1
    content: Turn | None = None
    openings: tuple[tuple[str, bool], ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the end of the turn is supervised."""
        return self.num_end > 0


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence.

    `input_ids` and `labels` are lists of the same length. `labels[i]` is -100 or the unshifted target: position i-1
    predicts it, so position 0 is always -100. `row` and `source` identify the conversation, `window` the part of it.
    `weights` multiply the losses of the supervised tokens, one each; empty if all are 1.
    """

    input_ids: list[int]
    labels: list[int]
    row: int
    source: str
    window: int = 0
    turn_spans: tuple[TurnSpan, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def num_supervised(self) -> int:
        """Number of supervised labels."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def supervised_turns_of(
    labels: Sequence[int] | np.ndarray, turns: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray
) -> np.ndarray:
    """The model turn of each supervised token, ints [supervised].

        labels   -100 -100 Yes </s> -100 No  </s>     turns 1 and 3 start at 2 and 5: 1 1 3 3

    An end token that is supervised where the next turn begins belongs to the turn before it.

    Args:
        labels: ints [tokens].
        turns: a number for each model turn, in the order of the tokens.
        starts: the first position of each model turn.
    """
    positions = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
    return np.asarray(turns)[np.searchsorted(starts, positions, side="right") - 1]


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """The outcome of one conversation: its examples (none if dropped), and a reason unless it was kept unchanged.

    `spelled` counts its turns that spell a control token, which stays text.
    """

    row: int
    id: Any
    status: Status
    examples: tuple[Example, ...]
    reason: str | None = None
    source: str = ""
    spelled: int = field(default=0, compare=False)  # counted, not stored
    has_reasoning: bool = field(default=False, compare=False)  # in a model turn of the data; likewise
    openings: tuple[tuple[str, bool], ...] = field(default=(), compare=False)  # of the supervised turns; likewise


@dataclass(slots=True)
class TokenizedConversation:
    """A conversation as tokens and labels; `rules` names what the format changed."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    turn_spans: list[TurnSpan] = field(default_factory=list)
    supervised_spans: list[SupervisedSpan] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    spelled: int = 0

    def add(self, ids: Sequence[int], *, supervised: bool) -> None:
        """Append ids, all of them supervised or all of them context."""
        self.input_ids += ids
        self.labels += ids if supervised else [IGNORE_INDEX] * len(ids)

    def truncate(self, length: int) -> TokenizedConversation:
        """The first `length` tokens; a supervised span that loses its end is no longer `ended`."""
        return TokenizedConversation(
            self.input_ids[:length],
            self.labels[:length],
            [replace(span, stop=min(span.stop, length)) for span in self.turn_spans if span.start < length],
            [
                replace(span, stop=min(span.stop, length), num_end=max(0, span.num_end - max(0, span.stop - length)))
                for span in self.supervised_spans
                if span.start < length
            ],
            self.rules,
            self.spelled,
        )


class ChatFormat(Protocol):
    """Tokenizes conversations in one format."""

    name: str
    plain: PlainTextTokenizer

    def split_history(self, conversation: Conversation) -> list[Conversation]:
        """The conversations that supervise each answer behind the prompt that serving would send.

        That is one unless the format writes an answer otherwise once other turns follow it.
        """
        ...

    def tokenize_all(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation | UnrenderableError]:
        """Tokenize each conversation; an error in place of each that the format cannot express."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything besides the tokenizer that decides how conversations are tokenized; JSON values."""
        ...


def tokenize_conversation(chat_format: ChatFormat, conversation: Conversation) -> TokenizedConversation:
    """Tokenize one conversation, or raise `UnrenderableError`."""
    (tokenized,) = chat_format.tokenize_all([conversation])
    if isinstance(tokenized, UnrenderableError):
        raise tokenized
    return tokenized
