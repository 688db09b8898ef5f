"""Where an answer ends in a rendering: with the tokens at which serving stops, in front of what no model writes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.chat_templates.template_skeleton import DUMMY_VALUE, OTHER_TEMPLATE, SlotSpan
from finetune.conversation import Turn

_BEGUN_TAG = re.compile(r"(?:[<\[]/?\w*)?\Z")
MAX_SHOWN = 24  # characters of a template's text in messages
NO_END = (
    "the chat template ends turn {turn} with no control token{found}, so stopping could not be supervised: "
    f"{OTHER_TEMPLATE} whose turns end with a token of this tokenizer"
)


@dataclass(frozen=True)
class TemplateText:
    """What a template writes for the marked turns of one conversation.

    Args:
        render: renders the first turns, with the prompt of the next answer or without.
        render_more: renders the first turns and one that follows them.
        render_bare: renders the turns in front of one, and its text alone.
        once: calls a function, unless its result for the first turns and one that follows them is known.
        control: matches a control token.
        eos: the tokenizer's own end token, which may open turns as well.
        opening: the prompt that the template writes behind a plain human turn, if it writes one.
        next_role_ends: whether nothing ends an answer but the token that opens the next turn.
    """

    render: Callable[[int, bool], str]
    render_more: Callable[[int], str]
    render_bare: Callable[[int], str]
    once: Callable[[int, Callable[[], Any]], Any]
    control: re.Pattern[str]
    eos: str | None
    opening: str
    next_role_ends: bool
    spelled: Sequence[str] = ()


@dataclass(frozen=True)
class AnswerEnd:
    """Where an answer ends in the rendering in which it is the last turn, and its end tokens.

    These are behind `stop` if the next turn begins with them, else in front of it.
    """

    stop: int
    tokens: tuple[str, ...]
    is_of_next_turn: bool = False


def without_prompt(whole: str, before: str, more: str, text: TemplateText) -> str:
    """A rendering without the prompt that Cohere's templates write at its end, whether one is asked for or not.

    Args:
        whole: the rendering, which ends with an answer.
        before: that of the turns in front of it, which ends with the same prompt.
        more: that with another turn behind it.
    """
    rest = whole[shared_size(more, whole, text) :]
    is_end = text.eos is not None and rest.strip().endswith(text.eos)  # Phi-3 ends each rendering so
    if not rest.strip() or is_end or not before.endswith(rest):
        return whole
    match = text.control.search(whole, len(whole) - common_size(whole[::-1], before[::-1]))
    return whole[: match.end()] if match else whole


def find_end(
    turn: Turn, number: int, alone: str, more: str, written: str, spans: Sequence[SlotSpan], text: TemplateText
) -> AnswerEnd | str:
    """Where the answer ends in `alone`; or why it does not end.

    It ends with the first control token after it and those directly behind that one, up to the end token of the
    tokenizer, as far as the template writes them in `more`, too, where another turn follows. What closes an answer on
    lines of its own (`\\n</response>\\n`), or closes a tag that the template has `written` behind the prompt, is no end
    where the next turn begins with one.
    """
    begin = spans[-1].stop if spans else 0
    if turn.tool_calls:
        last = DUMMY_VALUE if DUMMY_VALUE in alone else turn.tool_calls[-1].name
        plain = text.control.sub(lambda token: " " * len(token[0]), alone)  # a name may be part of a token
        begin = max(begin, plain.rfind(last) + len(last))
    own = spans[-1].start if spans and not turn.tool_calls else 0  # reasoning in front of it may be left out later
    shared = shared_size(more, alone, text)
    shared = shared if shared > begin else len(alone)  # what is written otherwise later does not count
    if turn.tool_calls:
        end, begin = _end_of_calls(alone, begin, shared, more, text), len(alone.rstrip())
        if end is None or (text.next_role_ends and text.eos not in end.tokens):
            is_tag = end is not None and end.tokens[-1].startswith("</")
            end = _next_role_end(alone, 0, begin, more, text) or (None if is_tag else end)
    else:
        end = _end_of_text(alone, begin, own, shared, more, text)
        last = end.tokens[-1] if end else ""
        if end is None or (last.startswith("</") and last != text.eos and last.replace("/", "", 1) in written):
            following = _next_role_end(alone, own, end.stop if end else begin, more, text)
            is_end = following and (
                end is None or following.tokens[0] == text.eos or following.tokens[0] not in written
            )
            end = following if is_end else end
    if end is not None:
        return end
    lacked = alone[begin : begin + MAX_SHOWN].strip()
    found = f" ({lacked!r} is none in this tokenizer)" if lacked else ""
    return NO_END.format(turn=number, found=found)


def _end_of_calls(alone: str, begin: int, shared: int, more: str, text: TemplateText) -> AnswerEnd | None:
    """The last control token behind a call."""
    every = [*text.control.finditer(alone, begin)]
    controls = [match for match in every if match.end() <= shared]
    # Olmo 3 ends its last turn with another token than earlier ones.
    last = skip_blank(more, every[-1].start()) if every else 0
    ends_otherwise = len(every) == len(controls) + 1 and text.control.match(more, last)
    if ends_otherwise and not alone[every[-1].end() :].strip():
        return AnswerEnd(every[-1].end(), (every[-1][0],))
    if controls and not alone[controls[-1].end() : shared].strip():
        return AnswerEnd(controls[-1].end(), (controls[-1][0],))
    return None


def _end_of_text(alone: str, begin: int, own: int, shared: int, more: str, text: TemplateText) -> AnswerEnd | None:
    """The control tokens behind a text, up to the end token of the tokenizer, at which every server stops."""
    match = text.control.match(alone, skip_blank(alone, begin))
    if not match and (further := text.control.search(alone, begin)) and alone[own : further.end()] in more:
        match = further
    if not match:
        return None
    tokens, stop = [match[0]], match.end()
    while text.eos not in tokens and (match := text.control.search(alone, stop)):
        is_next = match.start() == stop and match.end() <= shared
        if not is_next and alone[own : match.end()] not in more:
            break
        tokens, stop = [*(tokens if is_next else []), match[0]], match.end()
    return AnswerEnd(stop, tuple(tokens))


def _next_role_end(alone: str, own: int, begin: int, more: str, text: TemplateText) -> AnswerEnd | None:
    """The end of an answer, the characters `own` to `begin` and white space, by the token that opens the next turn."""
    written = alone[own:] if not alone[begin:].strip() and alone[own:] in more else alone[own:begin]
    place = more.find(written)
    match = text.control.match(more, skip_blank(more, place + len(written))) if place >= 0 else None
    return AnswerEnd(own + len(written), (match[0],), is_of_next_turn=True) if match else None


def common_size(first: str, second: str) -> int:
    """How many characters two texts have in common at their begin."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # so many are equal; the next may be
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shared_size(other: str, rendered: str, text: TemplateText) -> int:
    """How many characters two renderings have in common at their begin, the control tokens of the second whole."""
    shared = common_size(other, rendered)
    for match in text.control.finditer(rendered):
        if match.start() < shared < match.end():
            return match.start()
    return shared


def shared_lines(other: str, rendered: str, text: TemplateText) -> int:
    """`shared_size` without the beginning of a tag, as of `<think>` and `<tool_call>` that are no control tokens."""
    shared = shared_size(other, rendered, text)
    return shared - len(_BEGUN_TAG.search(rendered[max(0, shared - MAX_SHOWN) : shared])[0])  # type: ignore[index]


def skip_blank(text: str, begin: int) -> int:
    return begin + len(text[begin:]) - len(text[begin:].lstrip())
