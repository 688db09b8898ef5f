"""An example as text again: runs of what is read and what is learned, for a person to look at.

input_ids   <human> Hi   <model> Yes  <human>
labels      -100    -100 -100    Yes  </s>
segments    control "<human>", context "Hi", control "<model>", learned "Yes",
            learned_control "</s>" (not read), control "<human>"
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

from finetune.chat_templates.example import IGNORE_INDEX, ChatFormat, Example
from finetune.chat_templates.plain_text import PlainTextTokenizer

Kind = Literal["context", "learned", "control", "learned_control"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one kind in one turn; a control token is a segment of its own.

    `turn` is a number of `Example.turn_spans`, None between turns. `read` is False for what is learned at a position
    whose input is another token: the texts of the segments that are read, in order, are the example.
    """

    kind: Kind
    text: str
    turn: int | None
    read: bool = True

    @property
    def is_learned(self) -> bool:
        """Whether the labels hold it."""
        return self.kind.startswith("learned")

    @property
    def is_control(self) -> bool:
        """Whether it is a control token, and not text that spells one."""
        return self.kind.endswith("control")


InSegments = Callable[[Example], list[Segment]]


class _Place(NamedTuple):
    """One token to show: at which position, and whether it is that position's input or only its label."""

    kind: Kind
    token: int
    turn: int | None
    read: bool
    position: int


def segments(example: Example, plain: PlainTextTokenizer, markers: Collection[int] = ()) -> list[Segment]:
    """The example as runs of text.

    Args:
        plain: says what is a control token and what is text, as in training.
        markers: ids that open a turn although they are ordinary ones of the tokenizer.
    """
    control = plain.control_ids.union(markers)
    speller = _Speller(plain, example.input_ids)
    found = []
    for run in _runs(_places(example, control)):
        first = run[0]
        text = speller.name(first.token) if first.kind.endswith("control") else speller.text(run)
        found.append(Segment(first.kind, text, first.turn, first.read))
    return found


def speller(chat_format: ChatFormat) -> InSegments:
    """What turns an example of this format into text again."""
    # LingoWhale's markers may be ordinary ids of its tokenizer.
    markers = {number for ids in getattr(chat_format, "markers", {}).values() for number in ids}
    return lambda example: segments(example, chat_format.plain, markers)


def _places(example: Example, control: Collection[int]) -> Iterator[_Place]:
    turns = _turn_of_each_position(example)
    for position, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
        turn = turns[position]
        if label not in (IGNORE_INDEX, token):  # learned here, but another token is read: it belongs to the turn before
            kind: Kind = "learned_control" if label in control else "learned"
            yield _Place(kind, label, turns[position - 1], False, position)
        if label == token:
            kind = "learned_control" if token in control else "learned"
            # A real end token behind the last turn closes that turn.
            turn = turns[position - 1] if turn is None and position else turn
        else:
            kind = "control" if token in control else "context"
        yield _Place(kind, token, turn, True, position)


def _turn_of_each_position(example: Example) -> list[int | None]:
    turns: list[int | None] = [None] * len(example.input_ids)
    for span in example.turn_spans:
        turns[span.start : span.stop] = [span.turn] * (span.stop - span.start)
    return turns


def _runs(places: Iterator[_Place]) -> Iterator[list[_Place]]:
    """Neighbours of one kind and turn; control tokens one by one."""

    def key(place: _Place) -> tuple[Any, ...]:
        return place.kind, place.turn, place.read, place.position if place.kind.endswith("control") else None

    for _, run in groupby(places, key):
        yield list(run)


class _Speller:
    """Decodes runs as they read in their place."""

    def __init__(self, plain: PlainTextTokenizer, input_ids: Sequence[int]) -> None:
        self.tokenizer, self.added, self.input_ids = plain.tokenizer, plain.added, input_ids

    def name(self, token: int) -> str:
        """The spelling of a control token."""
        return self.added.get(token) or self._decode([token]) or str(self.tokenizer.convert_ids_to_tokens(token))

    def text(self, run: Sequence[_Place]) -> str:
        """The run's tokens decoded together, so that a character of several tokens stays whole.

        Some decoders drop the space that a text begins with: the token before the run keeps it in its place.
        """
        ids, begin = [place.token for place in run], run[0].position
        text = self._decode(ids)
        if begin and run[0].read:
            before = self._decode(self.input_ids[begin - 1 : begin])
            both = self._decode([self.input_ids[begin - 1], *ids])
            if both.startswith(before) and len(both) - len(before) > len(text):
                text = both[len(before) :]
        return text or "".join(map(str, self.tokenizer.convert_ids_to_tokens(ids)))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
