"""The text that a chat template writes around the contents, found by one rendering with placeholders.

    turns      human "Hi", model "Yes"            rendered with placeholders  <u>{0}</s><m>{1}</s>
    pieces     "<u>"  "</s><m>"  "</s>"           the text before, between and after the contents
    contents         "Hi"      "Yes"              located in the real rendering, exactly between the pieces

Conversations of one shape (the roles in order, and which turns have reasoning) share a skeleton. The real rendering of
each must be its pieces around its contents, so a template that writes something else for some contents is detected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date

from finetune.chat_templates.example import (
    REASONING_END,
    REASONING_RULE,
    SYSTEM_RULE,
    UnrenderableError,
    system_in_front,
)
from finetune.conversation import Role, Turn

# (role, has reasoning) for each turn
ConversationShape = tuple[tuple[Role, bool], ...]


@dataclass(frozen=True, slots=True)
class TemplateSkeleton:
    """The `pieces` around the contents; `order` has the numbers of the turns in the order of their contents.

    There is one piece more than contents. `tails` are the turns of which only the text after the reasoning is rendered.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    tails: frozenset[int] = frozenset()
    system_in_front: bool = False

    def rules(self) -> list[str]:
        """The rules by which this skeleton changes a conversation."""
        rules = [SYSTEM_RULE] if self.system_in_front else []
        return rules + [REASONING_RULE.format(turn=turn + self.system_in_front) for turn in sorted(self.tails)]


def with_date(template: str, day: date) -> str:
    """The template with this day in place of its calls of `strftime_now`, which would read the clock again each time.

    >>> with_date("{{ strftime_now('%d %b %Y') }}", date(2026, 11, 29))
    "{{ '29 Nov 2026' }}"
    """
    calls = r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)"""
    return re.sub(calls, lambda call: repr(day.strftime(call[2])), template)


def shape_of(turns: Sequence[Turn]) -> ConversationShape:
    """The shape that determines the skeleton."""
    return tuple((turn.role, REASONING_END in turn.text) for turn in turns)


def build_skeleton(
    shape: ConversationShape, render: Callable[[Sequence[Turn]], str]
) -> TemplateSkeleton | UnrenderableError:
    """The skeleton of a shape, or why there is none; `render` raises `UnrenderableError` if the template refuses."""
    turns = [Turn(role, _placeholder(number, has_reasoning)) for number, (role, has_reasoning) in enumerate(shape)]
    try:
        return _split_rendering(turns, shape, render(turns))
    except UnrenderableError as error:
        if shape[0][0] != "system" or len(shape) < 3 or shape[1][0] != "human":
            return error
        reason = error
    # The template has no system turn, or drops it: by rule it goes in front of the first human turn.
    inner = build_skeleton(shape_of(system_in_front(turns)), render)
    return reason if isinstance(inner, UnrenderableError) else replace(inner, system_in_front=True)


def _split_rendering(turns: Sequence[Turn], shape: ConversationShape, rendered: str) -> TemplateSkeleton:
    located, tails = [], set()
    for number, turn in enumerate(turns):
        content = turn.text
        if content not in rendered and shape[number][1]:
            tail = turn.text.rpartition(REASONING_END)[2]
            content = tail if tail in rendered else tail.lstrip()
            tails.add(number)
        if rendered.count(content) != 1 or (number in tails and _mark(number, "a") in rendered):
            raise UnrenderableError(f"the chat template leaves out, repeats or rewrites turn {number}")
        located.append((rendered.index(content), number, content))
    located.sort()
    pieces, end = [], 0
    for begin, _, content in located:
        pieces.append(rendered[end:begin])
        end = begin + len(content)
    return TemplateSkeleton((*pieces, rendered[end:]), tuple(number for _, number, _ in located), frozenset(tails))


def _placeholder(number: int, has_reasoning: bool) -> str:
    if has_reasoning:
        return f"<think>\n{_mark(number, 'a')}\n{REASONING_END}\n\n{_mark(number, 'b')}"
    return _mark(number, "")


def _mark(number: int, part: str) -> str:
    """Private-use characters, which no template tests for."""
    return f"\ue000{number}{part}\ue001"


def find_contents(text: str, skeleton: TemplateSkeleton, turns: Sequence[Turn]) -> list[str]:
    """The content of each turn as the text has it, unchanged or stripped, in the skeleton's order.

    Raises `UnrenderableError` if the text is not the skeleton's pieces around these contents.
    """
    if not text.startswith(skeleton.pieces[0]):
        raise UnrenderableError("the chat template begins otherwise with these contents than with plain ones")
    contents, begin = [], len(skeleton.pieces[0])
    for number, next_piece in zip(skeleton.order, skeleton.pieces[1:], strict=True):
        given = turns[number].text
        if number in skeleton.tails:
            given = given.rpartition(REASONING_END)[2]
        for content in (given, given.strip(), given.lstrip(), given.rstrip(), given.strip("\n"), given.lstrip("\n")):
            end = begin + len(content)
            if text.startswith(content, begin) and text.startswith(next_piece, end):
                break
        else:
            raise UnrenderableError(f"the chat template rewrites the text of turn {number + skeleton.system_in_front}")
        if not content.strip():
            raise UnrenderableError(f"the chat template leaves nothing of turn {number + skeleton.system_in_front}")
        contents.append(content)
        begin = end + len(next_piece)
    if begin != len(text):
        raise UnrenderableError("the chat template writes other text after these contents than after plain ones")
    return contents
