"""Render conversations to examples: whole, shortened between turns, or dropped with a reason; all labels checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from finetune.chat_templates.example import (
    REASONING_RULE,
    ChatFormat,
    Example,
    RenderedConversation,
    Status,
    TokenizedConversation,
    UnrenderableError,
    tokenize_conversation,
)
from finetune.chat_templates.label_check import check_labels
from finetune.chat_templates.messages import REASONING_END, without_reasoning
from finetune.chat_templates.raw_text import tokenize_text
from finetune.chat_templates.token_positions import JoinedPromptError
from finetune.chat_templates.truncation import (
    Tokenize,
    first_turn_cut,
    leading_turns,
    supervised_turns,
    truncate_to_fit,
    window_of,
)
from finetune.conversation import BadRow, Conversation, Turn, trained_on
from finetune.utils.errors import DataError

TooLong = Literal["turns", "windows", "drop", "error"]
TrainOn = Literal["model_turns", "last_model_turn"]
LEFT_OUT = REASONING_RULE.partition("{")[0]
# What begins reasoning in texts of published data in place of <think>.
OTHER_REASONING = ("<|begin_of_thought|>", "<thinking>", "<reasoning>", "<thought>", "<seed:think>", "[THINK]")
NOT_IN_FRONT = (
    "turn {number}: --reasoning drop and context know reasoning that stands in front of the answer, in <think> and "
    "</think>, or beside the text: write it so, or use --reasoning learn"
)
HISTORY_REASON = "the chat template writes an answer otherwise once other turns follow"
JOINED_REASON = "the tokenizer would join the end of a prompt with its answer"
_Tokenized = TokenizedConversation | UnrenderableError


class Renderer:
    """Renders conversations in one format, at most `max_length` tokens each.

    Args:
        too_long: what to do with a longer conversation. `turns` keeps as many complete leading turns as fit, ending
            with a model turn. Only the first model turn is ever cut, at its end, if it does not fit after its context;
            its end token is then not supervised. Context that alone fills the limit drops the row. `windows` does the
            same and makes each later model turn a window of its own, with as many preceding turns as fit and the
            system turn. `drop` drops the row, `error` makes it a bad row.
        train_on: `last_model_turn` makes all other model turns context.
        drops_reasoning: leave out the reasoning of all model turns.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        max_length: int,
        *,
        too_long: TooLong = "turns",
        train_on: TrainOn = "model_turns",
        drops_reasoning: bool = False,
    ) -> None:
        self.format = chat_format
        self.max_length = max_length
        self.too_long = too_long
        self.train_on = train_on
        self.drops_reasoning = drops_reasoning

    def render(self, conversation: Conversation) -> RenderedConversation:
        """Render one conversation."""
        (row,) = self.render_all([conversation])
        if isinstance(row, BadRow):
            raise DataError("\n".join(row.faults))
        return row

    def render_all(self, conversations: Sequence[Conversation]) -> list[RenderedConversation | BadRow]:
        """Render each conversation; what the format cannot express or fails the label check becomes a bad row."""
        parts = [self._parts(conversation) for conversation in conversations]
        whole = [part for row in parts for part in row if part.turns[0].role != "text"]
        tokenized = iter(self.format.tokenize_all(whole))
        outcomes = []
        for row in parts:
            if row[0].turns[0].role == "text":
                outcomes.append(self._text_outcome(row[0].turns[0]))
            else:
                results = [result for part in row for result in self._with_own_prompts(part, next(tokenized))]
                reason = HISTORY_REASON if len(results) == len(row) else JOINED_REASON
                outcomes.append(self._joined([self._outcome(*result) for result in results], reason))
        checked = iter(check_labels(self.format, [window for outcome in outcomes for window in outcome.windows]))
        return [
            self._rendered(conversation, outcome, [next(checked) for _ in outcome.windows])
            for conversation, outcome in zip(conversations, outcomes, strict=True)
        ]

    def identity(self) -> dict[str, Any]:
        """Everything that determines the output, as JSON values; part of the cache key of prepared data."""
        return {
            "tokenizer": self.format.plain.identity(),
            "format": self.format.identity(),
            "max_length": self.max_length,
            "too_long": self.too_long,
            "train_on": self.train_on,
            "drops_reasoning": self.drops_reasoning,
        }

    def _parts(self, conversation: Conversation) -> list[Conversation]:
        """The conversations to tokenize for one row: more than one if an answer needs a history of its own."""
        turns = conversation.turns
        if turns[0].role == "text":
            return [conversation]
        if self.drops_reasoning:
            turns = tuple(map(without_reasoning, turns))
        if self.train_on == "last_model_turn":
            last = max(number for number, turn in enumerate(turns) if turn.role == "model")
            turns = trained_on(turns, {last})
        if turns is not conversation.turns:
            conversation = replace(conversation, turns=turns)
        return self.format.split_history(conversation)

    def _with_own_prompts(self, part: Conversation, tokenized: _Tokenized) -> list[tuple[Conversation, _Tokenized]]:
        """A conversation for each answer that the tokenizer would join with its prompt, and one for all others."""
        if not isinstance(tokenized, JoinedPromptError):
            return [(part, tokenized)]
        turns, others = part.turns, {*supervised_turns(part.turns)} - {*tokenized.turns}
        parts = [replace(part, turns=trained_on(turns[: number + 1], {number})) for number in sorted(tokenized.turns)]
        parts += [replace(part, turns=trained_on(turns, others))] if others else []
        return list(zip(parts, self.format.tokenize_all(parts), strict=True))

    def _text_outcome(self, turn: Turn) -> _Outcome:
        try:
            blocks = tokenize_text(self.format.plain, turn.text, self.max_length)
        except UnrenderableError as error:
            return _Outcome("dropped", fault=str(error))
        if len(blocks) == 1:
            return _Outcome("kept", blocks, spelled=blocks[0].spelled)
        return _Outcome("split", blocks, f"{len(blocks)} blocks of a text", blocks[0].spelled)

    def _joined(self, outcomes: Sequence[_Outcome], own_reason: str) -> _Outcome:
        if len(outcomes) == 1:
            return outcomes[0]
        failed = next((outcome for outcome in outcomes if outcome.fault), None)
        dropped = [outcome for outcome in outcomes if not outcome.windows]
        if failed or (dropped and (self.too_long == "drop" or len(dropped) == len(outcomes))):
            return failed or dropped[0]
        windows = [window for outcome in outcomes for window in outcome.windows]
        for window in windows:  # the reasoning of histories, which HISTORY_REASON explains
            window.rules = [rule for rule in window.rules if not rule.startswith(LEFT_OUT)]
        reasons = dict.fromkeys(outcome.reason for outcome in outcomes if outcome.reason)
        status: Status = "split" if len(windows) > 1 else "cut"
        reason = "; ".join([f"{len(windows)} examples: {own_reason}", *reasons])
        return _Outcome(status, windows, reason, max(outcome.spelled for outcome in outcomes))

    def _outcome(self, conversation: Conversation, tokenized: TokenizedConversation | UnrenderableError) -> _Outcome:
        turns = conversation.turns
        if isinstance(tokenized, UnrenderableError):
            return _Outcome("dropped", fault=str(tokenized))
        if not supervised_turns(turns):
            return _Outcome("dropped", fault="no turn of it is supervised")
        leaves_out = self.drops_reasoning or getattr(self.format, "masks_reasoning", False)
        for number, turn in enumerate(turns if leaves_out else ()):
            answer = without_reasoning(turn).text if turn.role == "model" else ""
            if REASONING_END in answer or answer.lstrip().startswith(OTHER_REASONING):
                return _Outcome("dropped", fault=NOT_IN_FRONT.format(number=number))
        fitted = truncate_to_fit(tokenized, self.max_length)
        if fitted is not None:
            return _Outcome("kept", [fitted], spelled=tokenized.spelled)
        total = f"{len(tokenized.input_ids):,} tokens"
        if self.too_long == "error":
            return _Outcome("dropped", fault=f"{total}, more than --model_max_length {self.max_length:,}")
        if self.too_long == "drop":
            return _Outcome("dropped", reason=f"{total}, more than --model_max_length {self.max_length:,}")
        shorten = self._split if self.too_long == "windows" else self._shorten
        try:
            outcome = shorten(conversation, tokenized)
        except UnrenderableError as error:  # a template may accept the whole and refuse a part
            return _Outcome("dropped", fault=f"{total}: {error}")
        return replace(outcome, reason=f"{total}: {outcome.reason}", spelled=tokenized.spelled)

    def _shorten(self, conversation: Conversation, tokenized: TokenizedConversation) -> _Outcome:
        turns, tokenize = conversation.turns, self._tokenizer_of(conversation)
        leading = leading_turns(turns, tokenized, self.max_length, tokenize)
        if leading is not None and leading[0].supervised_spans:
            return _Outcome("cut", [leading[0]], f"the first {leading[1]} of {len(turns)} turns are kept")
        cut = None if leading else first_turn_cut(turns, self.max_length, tokenize)
        if cut is not None:
            return _Outcome("cut", [cut], self._cut_reason(cut))
        first = next(turn for turn in turns if turn.role == "model")
        if first.train and not first.tool_calls:
            reason = f"the context before the first model turn alone fills {self.max_length:,}"
        else:
            reason = f"no supervised turn fits into {self.max_length:,}"
        return _Outcome("dropped", reason=reason)

    def _split(self, conversation: Conversation, tokenized: TokenizedConversation) -> _Outcome:
        turns, tokenize = conversation.turns, self._tokenizer_of(conversation)
        first, num_leading = leading_turns(turns, tokenized, self.max_length, tokenize) or (None, 0)
        # Leading turns without a supervised one are not a window; they are the context of the next.
        windows = [first] if first is not None and first.supervised_spans else []
        notes = []
        for number in supervised_turns(turns):
            if number < num_leading:
                continue
            window = window_of(turns, number, tokenized, self.max_length, tokenize)
            if window is None:
                cause = "its call does not fit" if turns[number].tool_calls else "the context before it alone fills"
                notes.append(f"turn {number} is left out, {cause} {self.max_length:,}")
            else:
                windows.append(window)
                notes += [] if window.supervised_spans[-1].ended else [f"turn {number}: {self._cut_reason(window)}"]
        if not windows:
            return _Outcome("dropped", reason="; ".join(notes))
        count = f"{len(windows)} windows" if len(windows) > 1 else "one window"
        return _Outcome("split" if len(windows) > 1 else "cut", windows, "; ".join([count, *notes]))

    def _cut_reason(self, tokenized: TokenizedConversation) -> str:
        kept = sum(span.stop - span.start for span in tokenized.supervised_spans)
        turn = "the first model turn" if self.too_long == "turns" else "it"
        return f"{turn} keeps its first {kept:,} tokens, no end of turn"

    def _tokenizer_of(self, conversation: Conversation) -> Tokenize:
        return lambda turns: tokenize_conversation(self.format, replace(conversation, turns=tuple(turns)))

    def _rendered(
        self, conversation: Conversation, outcome: _Outcome, label_faults: Sequence[str | None]
    ) -> RenderedConversation | BadRow:
        fault = outcome.fault or next(filter(None, label_faults), None)
        if fault:
            place = f"{conversation.source}, row {conversation.row}"
            return BadRow(conversation.row, conversation.source, conversation.id, (f"{place}: {fault}",))
        examples = tuple(
            Example(
                window.input_ids,
                window.labels,
                conversation.row,
                conversation.source,
                index,
                tuple(window.turn_spans),
                _weights(conversation.turns, window),
            )
            for index, window in enumerate(outcome.windows)
        )
        rules = dict.fromkeys([*conversation.repairs, *(rule for window in outcome.windows for rule in window.rules)])
        reason = "; ".join(filter(None, [outcome.reason, *rules])) or None
        drops_turn = any(repair.startswith("drop_last_human") for repair in conversation.repairs)
        status = "cut" if outcome.status == "kept" and drops_turn else outcome.status
        has_reasoning = any(
            turn.role == "model" and (turn.reasoning or REASONING_END in turn.text) for turn in conversation.turns
        )
        return RenderedConversation(
            conversation.row, conversation.id, status, examples, reason, conversation.source, outcome.spelled,
            has_reasoning,
            tuple(pair for window in outcome.windows for span in window.supervised_spans for pair in span.openings),
        )  # fmt: skip


def _weights(turns: Sequence[Turn], window: TokenizedConversation) -> tuple[float, ...]:
    spans = window.supervised_spans
    if all(turns[span.turn].weight == 1 for span in spans):
        return ()
    return tuple(turns[span.turn].weight for span in spans for _ in range(span.start, span.stop))


@dataclass(slots=True)
class _Outcome:
    """The outcome of one conversation before its labels are checked; no windows if there is a fault."""

    status: Status
    windows: list[TokenizedConversation] = field(default_factory=list)
    reason: str | None = None
    spelled: int = 0
    fault: str | None = None
