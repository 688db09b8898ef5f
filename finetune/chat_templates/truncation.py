"""Shorten a conversation that exceeds the limit: keep leading turns, or split it into windows.

turns      h m h m h m      as many complete leading turns as fit; only the first model turn may be cut inside
windows    h m h m          the same, and each later model turn gets a window of its own, with as many preceding turns
             h m h m        as fit and the system turn; each model turn is supervised exactly once
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from finetune.chat_templates.example import TokenizedConversation, UnrenderableError
from finetune.conversation import Turn, trained_on

Tokenize = Callable[[Sequence[Turn]], TokenizedConversation]


def truncate_to_fit(tokenized: TokenizedConversation, max_length: int) -> TokenizedConversation | None:
    """The conversation if all supervised tokens fit; the template's text after them (a newline, say) may be dropped."""
    if len(tokenized.input_ids) <= max_length:
        return tokenized
    last = max((span.stop for span in tokenized.supervised_spans), default=0)
    return tokenized.truncate(max_length) if 0 < last <= max_length else None


def leading_turns(
    turns: Sequence[Turn], whole: TokenizedConversation, max_length: int, tokenize: Tokenize
) -> tuple[TokenizedConversation, int] | None:
    """As many complete leading turns as fit, and how many turns these are; a call is not parted from its result."""
    model_turns = [number for number, turn in enumerate(turns) if turn.role == "model" and not turn.tool_calls]
    model_turns = [number for number in model_turns if number < len(turns) - 1]
    stops = {span.turn: span.stop for span in whole.turn_spans}
    num_likely = sum(stops.get(number, 0) <= max_length for number in model_turns)
    # One turn more than the whole conversation suggests: some templates render a prefix shorter.
    for number in reversed(model_turns[: num_likely + 1]):
        # Its last answer may need the prompt of serving, which the others do not have.
        with suppress(UnrenderableError):
            fitted = truncate_to_fit(tokenize(turns[: number + 1]), max_length)
            if fitted is not None:
                return fitted, number + 1
    return None


def first_turn_cut(turns: Sequence[Turn], max_length: int, tokenize: Tokenize) -> TokenizedConversation | None:
    """The first model turn after its context, cut at its end; None if the context alone fills the limit."""
    first = next(number for number, turn in enumerate(turns) if turn.role == "model")
    return _cut(tokenize(turns[: first + 1]), turns[first], max_length)


def _cut(tokenized: TokenizedConversation, turn: Turn, max_length: int) -> TokenizedConversation | None:
    if turn.tool_calls:
        return None  # half a call is no call
    cut = tokenized.truncate(max_length)
    return cut if any(span.stop > span.start for span in cut.supervised_spans) else None


def window_of(
    turns: Sequence[Turn], last: int, whole: TokenizedConversation, max_length: int, tokenize: Tokenize
) -> TokenizedConversation | None:
    """Turn `last`, the only supervised one, after the system turn and as many preceding turns as fit.

    If not even the turn before it fits too, it is cut at its end; None if that leaves nothing to supervise.
    """
    num_system = int(turns[0].role == "system")
    starts = {span.turn: span.start for span in whole.turn_spans}
    stops = {span.turn: span.stop for span in whole.turn_spans}
    system_length = stops.get(0, 0) if num_system else 0
    begins = [number for number in range(num_system, last) if turns[number].role == "human"] or [last]

    def window(begin: int) -> TokenizedConversation:
        numbers = [*range(num_system), *range(begin, last + 1)]
        tokenized = tokenize(trained_on([turns[number] for number in numbers], {len(numbers) - 1}))
        tokenized.turn_spans = [replace(span, turn=numbers[span.turn]) for span in tokenized.turn_spans]
        tokenized.supervised_spans = [replace(span, turn=numbers[span.turn]) for span in tokenized.supervised_spans]
        return tokenized

    estimate = next(
        (
            index
            for index, number in enumerate(begins)
            if system_length + stops[last] - starts.get(number, 0) <= max_length
        ),
        len(begins) - 1,
    )
    likely = window(begins[estimate])
    best = truncate_to_fit(likely, max_length)
    if best is not None:  # the whole conversation gives an estimate only: more turns may fit
        for begin in reversed(begins[:estimate]):
            longer = truncate_to_fit(window(begin), max_length)
            if longer is None:
                break
            best = longer
        return best
    shortest = window(begins[-1]) if estimate < len(begins) - 1 else likely
    fitted = truncate_to_fit(shortest, max_length)
    if fitted is None:
        return _cut(shortest, turns[last], max_length)
    longer_ones = (truncate_to_fit(window(begin), max_length) for begin in begins[estimate + 1 : -1])
    return next(filter(None, longer_ones), fitted)


def supervised_turns(turns: Sequence[Turn]) -> list[int]:
    """Numbers of the supervised turns."""
    return [number for number, turn in enumerate(turns) if turn.is_supervised]
