"""What becomes of a conversation longer than the limit: cut between turns, split into windows.

turns      h m h m h m      as many complete leading turns as fit; only the first model turn may be cut inside
windows    h m h m          the same, and for each model turn behind them a window of its own, with as many
             h m h m        preceding turns as fit and the system turn; each model turn is learned exactly once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from finetune.chat_templates.example import TokenizedConversation
from finetune.chat_templates.supervision_rules import is_supervised
from finetune.conversation import Turn

LayOut = Callable[[Sequence[Turn]], TokenizedConversation]


def truncate_to_fit(layout: TokenizedConversation, max_length: int) -> TokenizedConversation | None:
    """The layout when all that is learned fits; a template's tail behind it (a newline, say) may be left out."""
    if len(layout.input_ids) <= max_length:
        return layout
    return layout.cut(max_length) if 0 < layout.last_learned <= max_length else None


def leading_turns(
    turns: Sequence[Turn], whole: TokenizedConversation, max_length: int, lay_out: LayOut
) -> tuple[TokenizedConversation, int] | None:
    """The longest layout of complete leading turns that fits, and how many turns it has."""
    model_turns = [number for number, turn in enumerate(turns) if turn.role == "model"][:-1]
    ends = {span.turn: span.stop for span in whole.spans}
    likely = [number for number in model_turns if ends[number] <= max_length]
    # One turn more than the whole layout suggests: some templates render a prefix shorter.
    for number in reversed(model_turns[: len(likely) + 1]):
        layout = truncate_to_fit(lay_out(turns[: number + 1]), max_length)
        if layout is not None:
            return layout, number + 1
    return None


def first_turn_cut(turns: Sequence[Turn], max_length: int, lay_out: LayOut) -> TokenizedConversation | None:
    """The first model turn behind its context, cut at its end; None when the context alone fills the limit."""
    first = next(number for number, turn in enumerate(turns) if turn.role == "model")
    layout = lay_out(turns[: first + 1]).cut(max_length)
    return layout if any(answer.stop > answer.start for answer in layout.answers) else None


def window_of(
    turns: Sequence[Turn], last: int, whole: TokenizedConversation, max_length: int, lay_out: LayOut
) -> TokenizedConversation | None:
    """Turn `last`, learned alone, behind as many preceding turns as fit and the system turn.

    Where not even the turn before it fits with it, it is cut at its end; None when that leaves nothing to learn.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    starts = {span.turn: span.start for span in whole.spans}
    stops = {span.turn: span.stop for span in whole.spans}
    head = stops.get(0, 0) if system else 0
    begins = [number for number in range(len(system), last) if turns[number].role == "human"]

    def window(begin: int) -> TokenizedConversation:
        kept = [replace(turn, train=turn.train and number == last) for number, turn in enumerate(turns)]
        numbers = [*range(len(system)), *range(begin, last + 1)]
        layout = lay_out([kept[number] for number in numbers])
        layout.spans = [replace(span, turn=numbers[span.turn]) for span in layout.spans]
        layout.answers = [replace(answer, turn=numbers[answer.turn]) for answer in layout.answers]
        return layout

    begins = begins or [last]
    place = next(
        (place for place, number in enumerate(begins) if head + stops[last] - starts.get(number, 0) <= max_length),
        len(begins) - 1,
    )
    best = truncate_to_fit(window(begins[place]), max_length)
    if best is not None:  # the whole layout only suggests where to begin: is there room for more?
        while place and (earlier := truncate_to_fit(window(begins[place - 1]), max_length)):
            best, place = earlier, place - 1
        return best
    for number in begins[place + 1 :]:
        best = truncate_to_fit(window(number), max_length)
        if best is not None:
            return best
    cut = window(begins[-1]).cut(max_length)
    return cut if any(answer.stop > answer.start for answer in cut.answers) else None


def supervised_turns(turns: Sequence[Turn]) -> list[int]:
    """Numbers of the turns that are to be learned."""
    return [number for number, turn in enumerate(turns) if is_supervised(turn)]
