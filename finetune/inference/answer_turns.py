"""What a model generated as a turn: its text, its reasoning and its tool calls; and as text for display.

    generated   <think> It is asked for. </think> <tool_call> {"name": "f", "arguments": {"x": 1}} </tool_call>
    turn        reasoning "It is asked for.", tool_calls f({"x": 1})

Calls are looked for in all known syntaxes. A turn counts if the template writes what was generated for it, white space
aside; anything else is text. So an answer is never read in a syntax that the template does not write.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from finetune.chat_templates import ChatFormat, answer_ids, answer_text, decode_after
from finetune.chat_templates.generation_prompt import REASONING, TEXT
from finetune.chat_templates.messages import with_reasoning_inside
from finetune.conversation import Conversation, ToolCall, Turn
from finetune.dataset.call_elements import element_calls
from finetune.dataset.tool_reading import read_calls
from finetune.dataset.written_calls import bracketed_calls, tools_in_text

_SHAPES = ((TEXT, REASONING), ("", REASONING), ("", ""), (TEXT, ""))  # what may stand beside calls
_VALUE = re.compile(r"[{\[]")
# A name in front of its arguments: gpt-oss, Mistral since v11, DeepSeek, Kimi.
_NAMED = re.compile(
    r"(?:to=functions\.|\[TOOL_CALLS\]\s*|<[|｜]tool[▁_]call[▁_]begin[|｜]>(?:function<[|｜]tool[▁_]sep[|｜]>)?)"
    r"([\w.-]+)(?:\[CALL_ID\](\w+))?[^{]*"
)


class ReasoningText(str):
    """A piece of an answer's reasoning."""


def tools_of(conversation: Conversation) -> Sequence[Mapping[str, Any]]:
    """The declarations of a conversation, those between `<tools>` tags in its system turn too."""
    first = conversation.turns[0]
    return conversation.tools or (tools_in_text(first.text) if first.role == "system" else ())


def answer_turn(
    chat_format: ChatFormat, conversation: Conversation, prompt: Sequence[int], answer: Sequence[int]
) -> Turn:
    """The turn of `answer`, the generated ids after `prompt` without the end of the turn.

    Calls are read only if the conversation declares tools.
    """
    generated = _spelled(chat_format, prompt, answer)
    tools = tools_of(conversation)
    for calls in chain(_calls(generated[0], tools) if tools else (), [()]):
        for text, reasoning in _SHAPES if calls else _SHAPES[:1]:
            turn = Turn("model", text, reasoning=reasoning, tool_calls=calls)
            ids = answer_ids(chat_format, conversation, prompt, turn)
            if ids is not None and (found := _contents(_spelled(chat_format, prompt, ids), generated)) is not None:
                return replace(turn, text=found.get(TEXT, "").strip(), reasoning=found.get(REASONING, "").strip())
    return Turn("model", answer_text(chat_format, conversation, prompt, answer))


def _spelled(chat_format: ChatFormat, before: Sequence[int], ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of ids without the control tokens at their end, those inside spelled; and the latter."""
    plain = chat_format.plain.for_answers
    ids = [token for token in ids if plain.tokenizer.convert_ids_to_tokens(token) is not None]
    while ids and ids[-1] in plain.control_ids:
        ids.pop()
    first, both = plain.decode_all([before[-1:], [*before[-1:], *ids]])
    return both.removeprefix(first), [token for token in ids if token in plain.control_ids]


def _contents(written: tuple[str, list[int]], generated: tuple[str, list[int]]) -> dict[str, str] | None:
    """The contents of a generated text by the sample's; None if the template would not write it so."""
    pieces = re.split(f"({TEXT}|{REASONING})", written[0])
    if written[1] != generated[1] or len(pieces) != len(set(pieces[1::2])) * 2 + 1:
        return None
    pattern = r"\s*".join(
        rf"(?P<{piece}>.*?\S.*?)" if piece in (TEXT, REASONING) else r"\s*".join(map(re.escape, "".join(piece.split())))
        for piece in pieces
    )
    match = re.fullmatch(rf"\s*{pattern}\s*", generated[0], re.DOTALL)
    return None if match is None else match.groupdict()


def _calls(text: str, tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[ToolCall, ...]]:
    """Calls that a text may hold, by syntax: all, then without the first ones, which reasoning may only quote."""
    of_python = tuple(bracketed_calls(text, {tool["function"]["name"] for tool in tools})[1])
    for calls in (_json_calls(text), _named_calls(text), tuple(element_calls(text, tools)[0]), of_python):
        yield from (calls[start:] for start in range(len(calls)))


def _json_calls(text: str) -> tuple[ToolCall, ...]:
    """JSON values with a name and arguments."""
    calls, place = list[ToolCall](), 0
    while match := _VALUE.search(text, place):
        value, place = _decoded(text, match.start())
        read, faults = read_calls(value)
        if read and not faults:
            calls += read
        else:
            place = match.end()
    return tuple(calls)


def _named_calls(text: str) -> tuple[ToolCall, ...]:
    calls = [
        ToolCall(match[1], value, match[2])
        for match in _NAMED.finditer(text)
        if isinstance(value := _decoded(text, match.end())[0], dict)
    ]
    return tuple(calls)


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def call_text(call: ToolCall) -> str:
    """A call on one line: `f({"x": 1})`."""
    return f"{call.name}({json.dumps(call.arguments, ensure_ascii=False)})"


def turn_text(turn: Turn) -> str:
    """A model turn as one text, its calls below it."""
    text = "\n\n".join(filter(None, [turn.text, "\n".join(map(call_text, turn.tool_calls))]))
    return with_reasoning_inside(turn.reasoning, text) if turn.reasoning else text


def pieces_to_show(
    pieces: Iterable[str], chat_format: ChatFormat, conversation: Conversation, prompt: Sequence[int]
) -> Iterator[str]:
    """Yield an answer's pieces, without what the template writes around its parts; `ReasoningText` is of reasoning."""
    begin, end, opening = _openings(chat_format, conversation, prompt)
    text, kind = "", None if begin or end or opening else str
    for piece in chain(pieces, [None]):
        text += piece or ""
        if kind is None:
            start = text.lstrip()
            if piece and any(opener.startswith(start) and opener != start for opener in (begin, opening)):
                continue  # it may become one of them
            if end and start.startswith(begin):
                kind, text = ReasoningText, start.removeprefix(begin)
            else:
                kind, text = str, start.removeprefix(opening)
        if kind is ReasoningText:
            before, found, after = text.partition(end)
            held = 0 if found or piece is None else _overlap(before, end)
            yield ReasoningText(before[: len(before) - held])
            text = before[len(before) - held :]
            if found:
                kind, text = str, after
        if kind is str:
            yield text
            text = ""


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of `text` may begin `end`."""
    return next(size for size in range(min(len(text), len(end)), -1, -1) if end.startswith(text[len(text) - size :]))


def _openings(chat_format: ChatFormat, conversation: Conversation, prompt: Sequence[int]) -> tuple[str, str, str]:
    """What the template writes in front of reasoning, between it and the text, and in front of an answer without it."""

    def written(turn: Turn) -> str:
        return decode_after(chat_format.plain, prompt, answer_ids(chat_format, conversation, prompt, turn) or ())

    begin, found, rest = written(Turn("model", TEXT, reasoning=REASONING)).partition(REASONING)
    opening = written(Turn("model", TEXT)).partition(TEXT)[0].strip()
    return (begin.strip(), rest.partition(TEXT)[0].strip(), opening) if found else ("", "", opening)
