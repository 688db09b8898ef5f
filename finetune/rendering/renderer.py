"""One conversation in, its examples out: whole, shortened between turns, or dropped with the reason."""

from __future__ import annotations

from finetune.conversations import Conversation
from finetune.errors import DataError
from finetune.rendering.examples import (
    IGNORE_INDEX,
    ChatFormat,
    Example,
    Layout,
    Rendering,
    Status,
    TurnSpan,
    Unrenderable,
)


class Renderer:
    """Renders conversations in one format, at most `max_length` tokens each.

    A conversation that is too long keeps as many complete leading turns as fit, ending with a model turn. The only
    cut inside a turn is the first model turn's, at its end, when it does not fit after its context; its end token is
    then not learned. Context that alone fills the limit drops the row.
    """

    def __init__(self, chat_format: ChatFormat, max_length: int) -> None:
        self.format = chat_format
        self.max_length = max_length

    def render(self, conversation: Conversation) -> Rendering:
        """Render one conversation.

        Raises:
            DataError: the format cannot express it; file, row and reason.
        """
        turns = conversation.turns
        try:
            layout = self.format.lay_out(turns)
            rule = self.format.rule
            fitting = self._fitted(layout)
            if fitting is not None:
                return self._rendering(conversation, "kept", fitting, rule)
            return self._shortened(conversation, layout)
        except Unrenderable as refusal:
            raise DataError(f"{conversation.source}, row {conversation.row}: {refusal}") from None

    def _fitted(self, layout: Layout) -> Layout | None:
        """The layout when all that is learned fits; a template's tail behind it (a newline, say) may be left out."""
        last_learned = max((at for at, label in enumerate(layout.labels) if label != IGNORE_INDEX), default=0)
        return _cut(layout, self.max_length) if last_learned < self.max_length else None

    def _shortened(self, conversation: Conversation, layout: Layout) -> Rendering:
        turns, total = conversation.turns, len(layout.input_ids)
        model_turns = [number for number, turn in enumerate(turns) if turn.role == "model"]
        for last in reversed(model_turns[:-1]):
            shorter = self._fitted(self.format.lay_out(turns[: last + 1]))
            if shorter is not None:
                reason = f"{total:,} tokens: the first {last + 1} of {len(turns)} turns are kept"
                return self._rendering(conversation, "cut", shorter, reason)
        first = self.format.lay_out(turns[: model_turns[0] + 1])
        learned = sum(label != IGNORE_INDEX for label in first.labels)
        cut = _cut(first, self.max_length)
        kept = sum(label != IGNORE_INDEX for label in cut.labels)
        if not kept:
            reason = f"{total:,} tokens: the context before the first model turn alone fills {self.max_length:,}"
            return Rendering(conversation.row, conversation.id, "dropped", (), reason)
        reason = f"{total:,} tokens: the first model turn keeps {kept:,} of {learned:,} learned tokens, no end of turn"
        return self._rendering(conversation, "cut", cut, reason)

    def _rendering(self, conversation: Conversation, status: Status, layout: Layout, reason: str | None) -> Rendering:
        labels = [IGNORE_INDEX, *layout.labels[1:]]
        example = Example(
            layout.input_ids, labels, conversation.row, conversation.source, turn_spans=tuple(layout.spans)
        )
        if not example.num_supervised:
            raise Unrenderable("nothing in it would be learned")
        return Rendering(conversation.row, conversation.id, status, (example,), reason)


def _cut(layout: Layout, length: int) -> Layout:
    spans = [
        TurnSpan(span.turn, span.role, span.start, min(span.stop, length))
        for span in layout.spans
        if span.start < length
    ]
    return Layout(layout.input_ids[:length], layout.labels[:length], spans)
