"""An example as text for display: runs of context and of supervised tokens.

input_ids   <human> Hi   <model> Yes  <human>
labels      -100    -100 -100    Yes  </s>
segments    control "<human>", context "Hi", control "<model>", learned "Yes",
            learned_control "</s>" (not read), control "<human>"
"""

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

    `kind` is stored in output folders; "learned" means supervised. `turn` is a number of `Example.turn_spans`, None
    between turns. `read` is False for a label at a position whose input is another token; the texts of all segments
    with `read` True are the example.
    """

    kind: Kind
    text: str
    turn: int | None
    read: bool = True

    @property
    def is_supervised(self) -> bool:
        """Whether it is in the labels."""
        return self.kind.startswith("learned")

    @property
    def is_control(self) -> bool:
        """Whether it is a control token, not text that spells one."""
        return self.kind.endswith("control")


Segmenter = Callable[[Example], list[Segment]]


class _Token(NamedTuple):
    """One token to show; `read`: it is the input of the position, not only its label."""

    kind: Kind
    id: int
    turn: int | None
    read: bool
    position: int


def segments(example: Example, plain: PlainTextTokenizer, markers: Collection[int] = ()) -> list[Segment]:
    """Split an example into segments; `markers` are ids that open a turn although they are ordinary tokens."""
    control = plain.control_ids.union(markers)
    return [
        Segment(
            run[0].kind,
            _name(plain, run[0].id) if run[0].kind.endswith("control") else _text(plain, example.input_ids, run),
            run[0].turn,
            run[0].read,
        )
        for run in _runs(_tokens(example, control))
    ]


def segmenter(chat_format: ChatFormat) -> Segmenter:
    """The function that splits examples of this format into segments."""
    # LingoWhale's markers may be ordinary ids of its tokenizer.
    markers = {token_id for ids in getattr(chat_format, "markers", {}).values() for token_id in ids}
    return lambda example: segments(example, chat_format.plain, markers)


def _tokens(example: Example, control: Collection[int]) -> Iterator[_Token]:
    turns: list[int | None] = [None] * len(example.input_ids)
    for span in example.turn_spans:
        turns[span.start : span.stop] = [span.turn] * (span.stop - span.start)
    for position, (token_id, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
        turn = turns[position]
        if label not in (IGNORE_INDEX, token_id):  # the input is another token: the label belongs to the turn before
            kind: Kind = "learned_control" if label in control else "learned"
            yield _Token(kind, label, turns[position - 1], False, position)
        if label == token_id:
            kind = "learned_control" if token_id in control else "learned"
            # A real end token after the last turn closes that turn.
            turn = turns[position - 1] if turn is None and position else turn
        else:
            kind = "control" if token_id in control else "context"
        yield _Token(kind, token_id, turn, True, position)


def _runs(tokens: Iterator[_Token]) -> Iterator[list[_Token]]:
    """Adjacent tokens of one kind and turn; control tokens one by one."""

    def key(token: _Token) -> tuple[Any, ...]:
        return token.kind, token.turn, token.read, token.position if token.kind.endswith("control") else None

    for _, run in groupby(tokens, key):
        yield list(run)


def _name(plain: PlainTextTokenizer, token_id: int) -> str:
    name = plain.added.get(token_id) or plain.decode([token_id])
    return name or str(plain.tokenizer.convert_ids_to_tokens(token_id))


def _text(plain: PlainTextTokenizer, input_ids: Sequence[int], run: Sequence[_Token]) -> str:
    """Decode a run as a whole, so that characters of several tokens are complete.

    Some decoders drop the space at the beginning of a text; decoding with the token before the run keeps it.
    """
    ids, begin = [token.id for token in run], run[0].position
    text = plain.decode(ids)
    if begin and run[0].read:
        before = plain.decode(input_ids[begin - 1 : begin])
        both = plain.decode([input_ids[begin - 1], *ids])
        if both.startswith(before) and len(both) - len(before) > len(text):
            text = both[len(before) :]
    return text or "".join(map(str, plain.tokenizer.convert_ids_to_tokens(ids)))
