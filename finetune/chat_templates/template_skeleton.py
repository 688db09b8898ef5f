"""What a chat template writes around the contents, learned from one rendering with placeholders.

    turns      human "Hi", model "Yes"            rendered with placeholders  <u>{0}</s><m>{1}</s>
    pieces     "<u>"  "</s><m>"  "</s>"           the text before, between and behind the contents
    contents         "Hi"      "Yes"              found again in the real rendering, exactly between the pieces

Conversations of one shape (the roles in order, and who reasons) share an outline; the real rendering of each must be
its pieces around its contents, so a template that writes something else for some contents is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.chat_templates.example import UnrenderableError
from finetune.chat_templates.supervision_rules import REASONING_END, REASONING_RULE, SYSTEM_RULE, system_in_front
from finetune.conversation import Turn

# (role, holds reasoning) for each turn
ConversationShape = tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class TemplateSkeleton:
    """`pieces` is one longer than `order`, the numbers of the turns as their contents follow each other.

    `tails` holds the turns of which only what follows the reasoning is rendered.
    """

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    tails: frozenset[int] = frozenset()
    system_in_front: bool = False

    def rules(self) -> list[str]:
        """What this outline changes about a conversation, by name."""
        named = [SYSTEM_RULE] if self.system_in_front else []
        return named + [REASONING_RULE.format(turn=turn + self.system_in_front) for turn in sorted(self.tails)]


def shape_of(turns: Sequence[Turn]) -> ConversationShape:
    """What an outline depends on."""
    return tuple((turn.role, REASONING_END in turn.text) for turn in turns)


def build_skeleton(
    shape: ConversationShape, render: Callable[[Sequence[Turn]], str]
) -> TemplateSkeleton | UnrenderableError:
    """The outline of a shape, or why there is none; `render` raises `UnrenderableError` where the template refuses."""
    turns = [Turn(role, _placeholder(number, reasons)) for number, (role, reasons) in enumerate(shape)]
    try:
        return _outline(turns, shape, render(turns))
    except UnrenderableError as refusal:
        if shape[0][0] != "system" or len(shape) < 3 or shape[1][0] != "human":
            return refusal
        reason = refusal
    # The template knows no system turn, or drops it: by rule it goes in front of the first human turn.
    inner = build_skeleton(shape_of(system_in_front(turns)), render)
    if isinstance(inner, UnrenderableError):
        return reason
    return TemplateSkeleton(inner.pieces, inner.order, inner.tails, system_in_front=True)


def _outline(turns: Sequence[Turn], shape: ConversationShape, rendered: str) -> TemplateSkeleton:
    places, tails = [], set()
    for number, turn in enumerate(turns):
        content = turn.text
        if content not in rendered and shape[number][1]:
            tail = turn.text.rpartition(REASONING_END)[2]
            content = tail if tail in rendered else tail.lstrip()
            tails.add(number)
        if rendered.count(content) != 1 or (number in tails and _mark(number, "a") in rendered):
            raise UnrenderableError(f"the chat template leaves out, repeats or rewrites turn {number}")
        places.append((rendered.index(content), number, content))
    pieces, at = [], 0
    for begin, _, content in sorted(places):
        pieces.append(rendered[at:begin])
        at = begin + len(content)
    return TemplateSkeleton(
        (*pieces, rendered[at:]), tuple(number for _, number, _ in sorted(places)), frozenset(tails)
    )


def _placeholder(number: int, reasons: bool) -> str:
    if reasons:
        return f"<think>\n{_mark(number, 'a')}\n{REASONING_END}\n\n{_mark(number, 'b')}"
    return _mark(number, "")


def _mark(number: int, part: str) -> str:
    """Private-use characters, which no template tests for."""
    return f"\ue000{number}{part}\ue001"


def find_contents(text: str, outline: TemplateSkeleton, turns: Sequence[Turn]) -> list[str]:
    """Each turn's content as it stands in the rendered text, in the outline's order: as given, or stripped.

    Raises:
        Unrenderable: the text is not the outline's pieces around these contents.
    """
    if not text.startswith(outline.pieces[0]):
        raise UnrenderableError("the chat template begins otherwise with these contents than with plain ones")
    contents, at = [], len(outline.pieces[0])
    for number, after in zip(outline.order, outline.pieces[1:], strict=True):
        said = turns[number].text
        if number in outline.tails:
            said = said.rpartition(REASONING_END)[2]
        for content in (said, said.strip(), said.lstrip(), said.rstrip(), said.strip("\n"), said.lstrip("\n")):
            end = at + len(content)
            if text.startswith(content, at) and text.startswith(after, end):
                break
        else:
            raise UnrenderableError(f"the chat template rewrites what turn {number + outline.system_in_front} says")
        if not content.strip():
            raise UnrenderableError(f"the chat template leaves nothing of turn {number + outline.system_in_front}")
        contents.append(content)
        at = end + len(after)
    if at != len(text):
        raise UnrenderableError("the chat template writes other text behind these contents than behind plain ones")
    return contents
