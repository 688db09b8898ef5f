"""Conversations in, their examples out: whole, shortened between turns, or dropped with the reason; each proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from finetune.chat_templates.example import (
    ChatFormat,
    Example,
    RenderedConversation,
    Status,
    TokenizedConversation,
    UnrenderableError,
    tokenize_conversation,
)
from finetune.chat_templates.label_check import check_labels
from finetune.chat_templates.truncation import (
    first_turn_cut,
    leading_turns,
    supervised_turns,
    truncate_to_fit,
    window_of,
)
from finetune.conversation import BadRow, Conversation, Turn
from finetune.utils.errors import DataError

TooLong = Literal["turns", "windows", "drop", "error"]
TrainOn = Literal["model_turns", "last_model_turn"]


class Renderer:
    """Renders conversations in one format, at most `max_length` tokens each.

    `too_long` says what becomes of a longer one. `turns`: it keeps as many complete leading turns as fit, ending with
    a model turn; the only cut inside a turn is the first model turn's, at its end, when it does not fit after its
    context, and its end token is then not learned; context that alone fills the limit drops the row. `windows`: the
    same, and each model turn behind them becomes a window of its own, with as many preceding turns as fit and the
    system turn. `drop` and `error` are what they say. `train_on="last_model_turn"` makes all other turns context.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        max_length: int,
        *,
        too_long: TooLong = "turns",
        train_on: TrainOn = "model_turns",
    ) -> None:
        self.format = chat_format
        self.max_length = max_length
        self.too_long = too_long
        self.train_on = train_on

    def render(self, conversation: Conversation) -> RenderedConversation:
        """Render one conversation.

        Raises:
            DataError: the format cannot express it, or its labels cannot be proven; file, row and reason.
        """
        (rendering,) = self.render_all([conversation])
        if isinstance(rendering, BadRow):
            raise DataError("\n".join(rendering.faults))
        return rendering

    def render_all(self, conversations: Sequence[Conversation]) -> list[RenderedConversation | BadRow]:
        """Render each conversation; one that the format cannot express or that fails its proof becomes a bad row."""
        rows = [self._turns(one) for one in conversations]
        fates = [self._fate(turns, layout) for turns, layout in zip(rows, self.format.tokenize_all(rows), strict=True)]
        proven = iter(
            check_labels(self.format, [layout for fate in fates if not fate.fault for layout in fate.layouts])
        )
        return [
            self._rendering(conversation, fate, [next(proven) for _ in fate.layouts] if not fate.fault else [])
            for conversation, fate in zip(conversations, fates, strict=True)
        ]

    def identity(self) -> dict[str, Any]:
        """All that decides what comes out, as JSON values: data rendered by an equal renderer is the same."""
        return {
            "tokenizer": self.format.plain.identity(),
            "format": self.format.identity(),
            "max_length": self.max_length,
            "too_long": self.too_long,
            "train_on": self.train_on,
        }

    def _turns(self, conversation: Conversation) -> Sequence[Turn]:
        if self.train_on == "model_turns":
            return conversation.turns
        last = max(number for number, turn in enumerate(conversation.turns) if turn.role == "model")
        return [
            replace(turn, train=turn.train and number == last) if turn.role == "model" else turn
            for number, turn in enumerate(conversation.turns)
        ]

    def _fate(self, turns: Sequence[Turn], layout: TokenizedConversation | UnrenderableError) -> _Fate:
        if isinstance(layout, UnrenderableError):
            return _Fate("dropped", fault=str(layout))
        if not supervised_turns(turns):
            return _Fate("dropped", fault="no turn of it is to be learned")
        whole = truncate_to_fit(layout, self.max_length)
        if whole is not None:
            return _Fate("kept", [whole], spelled=layout.spelled)
        total = f"{len(layout.input_ids):,} tokens"
        if self.too_long == "error":
            return _Fate("dropped", fault=f"{total}, more than --model_max_length {self.max_length:,}")
        if self.too_long == "drop":
            return _Fate("dropped", reason=f"{total}, more than --model_max_length {self.max_length:,}")
        try:
            fate = self._split(turns, layout) if self.too_long == "windows" else self._shortened(turns, layout)
        except UnrenderableError as refusal:  # a template may accept the whole and refuse a part
            return _Fate("dropped", fault=f"{total}: {refusal}")
        return replace(fate, reason=f"{total}: {fate.reason}", spelled=layout.spelled)

    def _shortened(self, turns: Sequence[Turn], layout: TokenizedConversation) -> _Fate:
        leading = leading_turns(turns, layout, self.max_length, self._lay_out)
        if leading is not None and leading[0].answers:
            return _Fate("cut", [leading[0]], f"the first {leading[1]} of {len(turns)} turns are kept")
        cut = None if leading else first_turn_cut(turns, self.max_length, self._lay_out)
        if cut is not None:
            return _Fate("cut", [cut], self._inner_cut(cut))
        if next(turn for turn in turns if turn.role == "model").train:
            return _Fate("dropped", reason=f"the context before the first model turn alone fills {self.max_length:,}")
        return _Fate("dropped", reason=f"no turn that is to be learned fits into {self.max_length:,}")

    def _split(self, turns: Sequence[Turn], layout: TokenizedConversation) -> _Fate:
        leading = leading_turns(turns, layout, self.max_length, self._lay_out)
        layouts, done, notes = [], 0, []
        if leading is not None:
            # Leading turns of which none is learned are no window; they are the context of the next.
            layouts, done = [leading[0]] if leading[0].answers else [], leading[1]
        for number in supervised_turns(turns):
            if number < done:
                continue
            window = window_of(turns, number, layout, self.max_length, self._lay_out)
            if window is None:
                notes.append(f"turn {number} is left out, the context before it alone fills {self.max_length:,}")
            else:
                layouts.append(window)
                notes += [] if window.answers[-1].ended else [f"turn {number}: {self._inner_cut(window)}"]
        if not layouts:
            return _Fate("dropped", reason="; ".join(notes))
        count = f"{len(layouts)} windows" if len(layouts) > 1 else "one window"
        return _Fate("split" if len(layouts) > 1 else "cut", layouts, "; ".join([count, *notes]))

    def _inner_cut(self, layout: TokenizedConversation) -> str:
        kept = sum(answer.stop - answer.start for answer in layout.answers)
        turn = "the first model turn" if self.too_long == "turns" else "it"
        return f"{turn} keeps its first {kept:,} tokens, no end of turn"

    def _lay_out(self, turns: Sequence[Turn]) -> TokenizedConversation:
        return tokenize_conversation(self.format, turns)

    def _rendering(
        self, conversation: Conversation, fate: _Fate, proofs: Sequence[str | None]
    ) -> RenderedConversation | BadRow:
        fault = fate.fault or next(filter(None, proofs), None)
        if fault:
            place = f"{conversation.source}, row {conversation.row}"
            return BadRow(conversation.row, conversation.source, conversation.id, (f"{place}: {fault}",))
        examples = tuple(
            Example(layout.input_ids, layout.labels, conversation.row, conversation.source, window, tuple(layout.spans))
            for window, layout in enumerate(fate.layouts)
        )
        rules = list(dict.fromkeys([*conversation.repairs, *(rule for one in fate.layouts for rule in one.rules)]))
        reason = "; ".join(filter(None, [fate.reason, *rules])) or None
        status = "cut" if fate.status == "kept" and _leaves_out(conversation) else fate.status
        return RenderedConversation(
            conversation.row, conversation.id, status, examples, reason, conversation.source, fate.spelled
        )


@dataclass(slots=True)
class _Fate:
    """What becomes of one conversation, before its labels are proven."""

    status: Status
    layouts: list[TokenizedConversation] = field(default_factory=list)
    reason: str | None = None
    spelled: int = 0
    fault: str | None = None


def _leaves_out(conversation: Conversation) -> bool:
    return any(repair.startswith("drop_last_human") for repair in conversation.repairs)
