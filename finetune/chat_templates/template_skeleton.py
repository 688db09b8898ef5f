"""The text that a chat template writes around the contents, found by renderings with placeholders.

    turns      human "Hi", model "Yes"            rendered with placeholders  <u>{0}</s><m>{1}</s>
    pieces     "<u>"  "</s><m>"  "</s>"           the text before, between and after the contents
    contents         "Hi"      "Yes"              located in the real rendering, exactly between the pieces
    answer                     "Yes</s>"          what the model must write after the prompt "<u>Hi</s><m>"

Conversations of one shape share a skeleton; one with tools has pieces of its own, because its declarations and calls
are in them. The real rendering of each must be its pieces around its contents, so a template that writes something
else for some contents is detected. The answers are found by `answer_spans`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import NamedTuple

from finetune.chat_templates.example import UnrenderableError
from finetune.chat_templates.messages import REASONING_BEGIN, REASONING_END, raw_parts, sample_tool, split_reasoning
from finetune.chat_templates.tested_words import between_words, has_words
from finetune.conversation import Conversation, ToolCall, Turn

_TEXT, _REASONING, _ANSWER, _JSON = "\ue002", "\ue003", "\ue004", "\ue005"
_PARTS = {_TEXT: "text", _REASONING: "reasoning", _ANSWER: "answer"}
_MARK = re.compile(f"\ue000(\\d+)([{_TEXT}{_REASONING}{_ANSWER}{_JSON}])\ue001")
_EMPTY_REASONING = re.compile(rf"\s*(?:{REASONING_BEGIN})?\s*{REASONING_END}\s*")
_SPACE = "\n\n\n"  # more than templates write themselves
_SPACED_BEGIN, _SPACED_END = f"{REASONING_BEGIN}{_SPACE}", f"{_SPACE}{REASONING_END}{_SPACE}"
_DUMMY = "q0x"  # part of each name and value of the placeholders of tools
DUMMY_VALUE = "valueq0x"
_DUMMY_ARGUMENTS = {"keyq0x": DUMMY_VALUE}
_DUMMY_TOOL = sample_tool("nameq0x", "keyq0x", "aboutq0x")
OTHER_TEMPLATE = "give another --chat_template (chatml and hermes suit every tokenizer)"


class Slot(NamedTuple):
    """A content: the text, the reasoning or the answer after it of a turn; a control token spelled in JSON."""

    turn: int | None
    part: str  # "text", "reasoning", "answer", or the control token


@dataclass(frozen=True, slots=True)
class Answer:
    """The characters that a model turn is supervised on, its end tokens included.

    `served_opening` is what the prompt of serving has behind the header of the turn (`<think>`). `has_prompt` is False
    where the header stands for a prompt that the template does not write. Pieces differ between conversations only
    where declarations and calls are: in their middle.
    """

    begin: tuple[int, int]  # index of the piece, characters from its start
    end: tuple[int, int]  # index of the piece, characters to its end
    end_tokens: tuple[str, ...]
    is_appended: bool = False  # the text ends without the end token
    served_opening: str = ""
    has_prompt: bool = True


@dataclass(frozen=True, slots=True)
class TemplateSkeleton:
    """The `pieces` around the contents of the `slots`, of which there is one less, and the answers among them.

    `refused` has the reason for each model turn that cannot be supervised in this conversation. With `is_completion`
    the last answer stands behind the prompt of serving, not as the template writes it.
    """

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]
    answers: dict[int, Answer] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    is_completion: bool = False
    system_in_front: bool = False
    rules: tuple[str, ...] = ()

    def openings(self, number: int, *, masks_reasoning: bool) -> tuple[tuple[str, bool], ...]:
        """What stands between the header of an answer and what the data say, and whether it is supervised."""
        answer = self.answers[number]
        first, offset = answer.begin
        written = self.pieces[first][offset:]
        own = self.slots[first] if first < len(self.slots) else None
        if own is None or own.turn != number:  # a call, whose syntax is no opening
            match = _EMPTY_REASONING.match(written)
            written = match[0] if match else ""
        is_masked = masks_reasoning and own is not None and own.part == "reasoning"
        return tuple(
            (text, supervised)
            for text, supervised in ((answer.served_opening, False), (written, not is_masked))
            if text.strip()
        )

    def with_pieces(self, pieces: Sequence[str]) -> TemplateSkeleton | None:
        """This skeleton with the pieces of one conversation with tools; None if its answers are not at their edges."""
        for answer in self.answers.values():
            (first, begin), (last, end) = answer.begin, answer.end
            if pieces[first][:begin] != self.pieces[first][:begin]:
                return None
            if end and pieces[last][-end:] != self.pieces[last][-end:]:
                return None
        return replace(self, pieces=tuple(pieces))


def with_date(template: str, day: date) -> str:
    """The template with this day in place of its calls of `strftime_now`, which would read the clock again each time.

    >>> with_date("{{ strftime_now('%d %b %Y') }}", date(2026, 11, 29))
    "{{ '29 Nov 2026' }}"
    """
    calls = r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)"""
    return re.sub(calls, lambda call: repr(day.strftime(call[2])), template)


def shape_of(conversation: Conversation) -> tuple[str, bool, str]:
    """The shape that determines the skeleton, but for the texts of declarations and calls."""
    kwargs = conversation.template_kwargs
    return " ".join(map(_code, conversation.turns)), bool(conversation.tools), repr(kwargs) if kwargs else ""


def rules_of_variables(conversation: Conversation, template: str) -> list[str]:
    """Return notes about variables of the row that the template does not use.

    Raises:
        UnrenderableError: content would be lost.
    """
    given = {name: value for name, value in conversation.template_kwargs.items() if value not in (None, "", [], {})}
    unused = [name for name in given if not re.search(rf"\b{re.escape(name)}\b", template)]
    if lost := ", ".join(name for name in unused if not isinstance(given[name], int | float)):
        raise UnrenderableError(f"the chat template does not use {lost} of the row: leave it out, or {OTHER_TEMPLATE}")
    return [f"the chat template does not use {', '.join(unused)} of the row"] if unused else []


def _code(turn: Turn) -> str:
    if turn.role != "model" or not (turn.reasoning or turn.tool_calls or REASONING_END in turn.text):
        return turn.role
    inside = "" if turn.reasoning else _kind_inside(turn)
    ids = "".join("c" if call.id is None else "i" for call in turn.tool_calls)
    return f"model{inside}{'+' if turn.reasoning else ''}{'' if turn.text.strip() else '-'}{ids}"


def _kind_inside(turn: Turn) -> str:
    """What is in front of the answer in the text: "reasoning", or an empty one as it is written."""
    inside = split_reasoning(turn.text)
    return "" if inside is None else "reasoning" if inside[0] else turn.text[: -len(raw_parts(turn.text)[1])]


def with_marks(conversation: Conversation, *, real_tools: bool, words: re.Pattern[str] | None = None) -> Conversation:
    """The conversation with placeholders as its texts, and of its tools and calls unless `real_tools`.

    Of human and system turns with `words` that a template tests for, these remain.
    """
    ids: dict[str | None, str | None] = {}  # of calls, with their placeholders
    turns = tuple(_marked(number, turn, None if real_tools else ids) for number, turn in enumerate(conversation.turns))
    if has_words(conversation, words):
        turns = tuple(
            replace(own, text=between_words(turn.text, words, own.text)[1]) if turn.role in ("human", "system") else own
            for turn, own in zip(conversation.turns, turns, strict=True)
        )
    tools = conversation.tools if real_tools or not conversation.tools else (_DUMMY_TOOL,)
    return replace(conversation, turns=turns, tools=tools)


def _marked(number: int, turn: Turn, ids: dict[str | None, str | None] | None) -> Turn:
    text, calls = _mark(number, _TEXT), turn.tool_calls
    if turn.role == "model":
        kind = "" if turn.reasoning else _kind_inside(turn)
        if not turn.text.strip():
            text = ""
        elif kind == "reasoning":
            text = f"{_SPACED_BEGIN}{_mark(number, _REASONING)}{_SPACED_END}{_mark(number, _ANSWER)}"
        elif kind:
            text = kind + _mark(number, _ANSWER)
    if ids is not None:
        ids |= {call.id: call.id and f"id{_DUMMY}{number:02}{index:02}" for index, call in enumerate(calls)}
        calls = tuple(
            ToolCall(f"name{_DUMMY}{index}", _DUMMY_ARGUMENTS, ids[call.id]) for index, call in enumerate(calls)
        )
        turn = replace(turn, tool_call_id=ids.get(turn.tool_call_id), tool_name=None)
    return replace(turn, text=text, reasoning=turn.reasoning and _mark(number, _REASONING), tool_calls=calls)


def next_turn(turns: Sequence[Turn]) -> Turn:
    """A turn with a mark that may follow these: the result of a tool, or a human turn."""
    return Turn("tool" if turns[-1].tool_calls else "human", _mark(len(turns), _TEXT))


def bare_turn(number: int) -> Turn:
    """A model turn with the mark of its text alone."""
    return Turn("model", _mark(number, _TEXT))


def marks_in(text: str) -> list[str]:
    """The marks in a text, in order."""
    return [match[0] for match in _MARK.finditer(text)]


def marks_reasoning(turn: Turn) -> bool:
    """Whether a turn with marks has reasoning, beside its text or inside it."""
    return _REASONING in turn.reasoning + turn.text


def _mark(number: int, part: str) -> str:
    """Private-use characters, which no template tests for."""
    return f"\ue000{number}{part}\ue001"


def mark_spelled(text: str, spelled: list[str], control: re.Pattern[str]) -> str:
    """The text with a mark in place of each control token that it spells; these are appended to `spelled`."""

    def mark(match: re.Match[str]) -> str:
        spelled.append(match[0])
        return _mark(len(spelled) - 1, _JSON)

    return control.sub(mark, text)


class SlotSpan(NamedTuple):
    """A slot and where its mark is in a rendering."""

    slot: Slot
    start: int
    stop: int


def find_slots(rendered: str, spelled: Sequence[str] = ()) -> list[SlotSpan]:
    """The slots of a rendering with marks, in order; `spelled` are the control tokens of the marks in JSON."""
    spans: list[SlotSpan] = []
    for match in _MARK.finditer(rendered):
        number, part = int(match[1]), match[2]
        slot = Slot(None, spelled[number]) if part == _JSON else Slot(number, _PARTS[part])
        before = spans[-1] if spans else None
        if (
            part == _ANSWER
            and before is not None
            and before.slot == (number, "reasoning")
            and rendered[before.stop : match.start()] == _SPACED_END.removeprefix(_SPACE)
            and rendered.endswith(REASONING_BEGIN, 0, before.start)
            and rendered.startswith(_SPACE, before.start)
        ):  # the template writes the text as it is: one content
            spans[-1] = SlotSpan(Slot(number, "text"), before.start - len(REASONING_BEGIN), match.end())
        else:
            spans.append(_with_own_space(slot, rendered, *match.span()))
    return spans


def _with_own_space(slot: Slot, rendered: str, start: int, stop: int) -> SlotSpan:
    """The span of a mark inside a text with reasoning, with the white space around it that the template keeps."""
    if slot.part in ("reasoning", "answer") and rendered.endswith(_SPACE, 0, start):
        start -= len(_SPACE)
    if slot.part == "reasoning" and rendered.startswith(_SPACE, stop):
        stop += len(_SPACE)
    return SlotSpan(slot, start, stop)


def pieces_between(rendered: str, spans: Sequence[SlotSpan]) -> list[str]:
    """The text before, between and after the slots."""
    begins = [0, *(span.stop for span in spans)]
    ends = [*(span.start for span in spans), len(rendered)]
    return [rendered[begin:end] for begin, end in zip(begins, ends, strict=True)]


def not_written(turns: Sequence[Turn], slots: Sequence[Slot]) -> list[int]:
    """The numbers of the turns whose texts are not written once."""
    written = [slot.turn for slot in slots if slot.part in ("text", "answer")]
    return [number for number, turn in enumerate(turns) if marks_in(turn.text) and written.count(number) != 1]


def find_contents(text: str, skeleton: TemplateSkeleton, turns: Sequence[Turn]) -> list[str]:
    """The content of each slot as the text has it, unchanged or stripped; a result of a tool may be written as JSON.

    Raises `UnrenderableError` if the text is not the skeleton's pieces around these contents.
    """
    if not text.startswith(skeleton.pieces[0]):
        raise UnrenderableError(
            f"the chat template begins otherwise with these contents than with plain ones: {OTHER_TEMPLATE}"
        )
    contents, begin = [], len(skeleton.pieces[0])
    for index, ((number, part), next_piece) in enumerate(zip(skeleton.slots, skeleton.pieces[1:], strict=True)):
        given = part if number is None else given_text(turns[number], part)
        for content in _forms(given, number, turns):
            end = begin + len(content)
            if text.startswith(content, begin) and text.startswith(next_piece, end):
                break
        else:
            if text.startswith(given, begin) and index + 1 < len(skeleton.slots):  # it is what follows
                number = skeleton.slots[index + 1].turn
            place = f"turn {_row_turn(skeleton, number)}"
            raise UnrenderableError(f"the chat template rewrites the text of {place}: {OTHER_TEMPLATE}")
        if not content.strip() and number is not None and turns[number].role != "tool":
            place = f"turn {_row_turn(skeleton, number)}"
            raise UnrenderableError(
                f"the chat template leaves nothing of {place}: {OTHER_TEMPLATE}, or correct the row"
            )
        contents.append(content)
        begin = end + len(next_piece)
    if begin != len(text):
        reason = "the chat template writes other text after these contents than after plain ones"
        raise UnrenderableError(f"{reason}: {OTHER_TEMPLATE}")
    return contents


def find_pieces(
    text: str, skeleton: TemplateSkeleton, turns: Sequence[Turn], control: re.Pattern[str]
) -> list[str] | None:
    """The pieces of a conversation with tools in its rendering, found by the control tokens around its contents.

    None where a piece with declarations or calls has no control token at the edge that tells where the next content
    is. No declaration and no call may spell a control token.
    """
    edges = [_edges(piece, control) for piece in skeleton.pieces]
    pieces: list[str] = []
    place = 0
    for (number, part), (head, tail), (next_head, _) in zip(skeleton.slots, edges[:-1], edges[1:], strict=True):
        if number is None or tail == "":
            return None
        for content in _forms(given_text(turns[number], part), number, turns):
            target = (tail or "") + content + next_head
            begin = place + len(head)
            found = text.find(target, begin) if tail else begin if text.startswith(target, begin) else -1
            if found >= 0:
                break
        else:
            return None
        end = found + len(tail or "")
        pieces.append(text[place:end])
        place = end + len(content)
    return [*pieces, text[place:]]


def _edges(piece: str, control: re.Pattern[str]) -> tuple[str, str | None]:
    """A piece and None; of one with placeholders of tools, what is written up to them and from them on."""
    first = piece.find(_DUMMY)
    if first < 0:
        return piece, None
    last = piece.rfind(_DUMMY) + len(_DUMMY)
    before = [match.end() for match in control.finditer(piece, 0, first)]
    after = control.search(piece, last)
    return piece[: before[-1]] if before else "", piece[after.start() :] if after else ""


def given_text(turn: Turn, part: str) -> str:
    """The text that the data has for a slot of this turn."""
    if part == "text" or (part == "reasoning" and turn.reasoning):
        return turn.text if part == "text" else turn.reasoning
    return raw_parts(turn.text)[part == "answer"]


def _forms(given: str, number: int | None, turns: Sequence[Turn]) -> Iterator[str]:
    yield given
    yield from (
        given.strip(),
        given.lstrip(),
        given.rstrip(),
        given.strip("\n"),
        given.lstrip("\n"),
        given.rstrip("\n"),
    )
    if number is not None and turns[number].role == "tool":
        yield from (json.dumps(given, ensure_ascii=False)[1:-1], json.dumps(given)[1:-1])


def _row_turn(skeleton: TemplateSkeleton, number: int | None) -> int:
    return (number or 0) + skeleton.system_in_front
