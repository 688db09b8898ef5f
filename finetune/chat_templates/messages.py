"""Conversation -> the messages that chat templates take, in the style that one template expects.

    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": ..., ...}}]}
    {"role": "tool", "content": ..., "tool_call_id": ..., "name": ...}
    {"role": "assistant", "content": ..., "reasoning_content": ...}

Templates differ in the form of the arguments (an object, or its JSON), in whether a content may be empty, in the ids
that they accept and in the key of the reasoning; `MessageStyle` holds these choices, found by rendering a sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune.conversation import Conversation, ToolCall, Turn

TEMPLATE_ROLES = {"human": "user", "model": "assistant", "system": "system", "tool": "tool"}
REASONING_BEGIN, REASONING_END = "<think>", "</think>"
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
PARTS = "content"  # the key of reasoning that is a part of the content, as in Mistral's templates
CallIds = Literal["given", "filled", "short", "named"]


def split_reasoning(text: str) -> tuple[str, str] | None:
    """The reasoning and the answer of a text with `</think>` in front of an answer; None for any other.

    >>> split_reasoning("<think>\\nAdd.\\n</think>\\n\\n5")
    ('Add.', '5')
    """
    if text.count(REASONING_END) != 1 or text.partition(REASONING_BEGIN)[0].strip() and REASONING_BEGIN in text:
        return None
    reasoning, answer = raw_parts(text)
    return (reasoning.strip(), answer.strip()) if answer.strip() else None


def normalized(conversation: Conversation) -> Conversation:
    """The conversation with reasoning in front of tool calls beside the text, and opened where only its end is."""
    if not any(turn.role == "model" and REASONING_END in turn.text for turn in conversation.turns):
        return conversation
    return replace(conversation, turns=tuple(map(_normalized_turn, conversation.turns)))


def _normalized_turn(turn: Turn) -> Turn:
    if turn.role != "model" or turn.reasoning or REASONING_END not in turn.text:
        return turn
    reasoning, answer = raw_parts(turn.text)
    if turn.tool_calls:
        return replace(turn, reasoning=reasoning.strip(), text=answer.strip())
    is_open = REASONING_BEGIN in turn.text or split_reasoning(turn.text) is None
    return turn if is_open else replace(turn, text=f"{REASONING_BEGIN}\n{turn.text}")


def raw_parts(text: str) -> tuple[str, str]:
    """The reasoning and the answer of a text with `</think>`, with their white space."""
    reasoning, _, answer = text.partition(REASONING_END)
    return reasoning.partition(REASONING_BEGIN)[2] if REASONING_BEGIN in reasoning else reasoning, answer


def without_reasoning(turn: Turn) -> Turn:
    """The turn with its answer alone."""
    turn = _normalized_turn(turn)
    inside = split_reasoning(turn.text) if turn.role == "model" else None
    return replace(turn, reasoning="", text=inside[1] if inside else turn.text)


def with_reasoning_inside(reasoning: str, answer: str) -> str:
    """Reasoning and answer as one text.

    >>> with_reasoning_inside("Add.", "5")
    '<think>\\nAdd.\\n</think>\\n\\n5'
    """
    return f"{REASONING_BEGIN}\n{reasoning}\n{REASONING_END}\n\n{answer}"


@dataclass(frozen=True, slots=True)
class MessageStyle:
    """How a template expects messages.

    `beside_key` is the key of reasoning that the data has beside the text, `inside_key` of that inside it; None: it is
    inside the content. With `has_plans` that beside calls is a `tool_plan`, as Cohere has it. `call_ids`: those of the
    data, with made ones where it has none, all of nine characters as Mistral's templates demand, or
    `functions.NAME:0`, of which Kimi's templates write the name. `texts_as_parts`: contents are lists of parts, as
    templates of models with images have them.
    """

    arguments_as_json: bool = False
    empty_content: str | None = ""
    call_ids: CallIds = "given"
    beside_key: str | None = None
    inside_key: str | None = None
    has_plans: bool = False
    texts_as_parts: bool = False

    def messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages of all turns."""
        ids = _ToolCallIds(self.call_ids)
        messages = [self._message(turn, ids) for turn in conversation.turns]
        for message in messages if self.texts_as_parts else ():
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        return messages

    def _message(self, turn: Turn, ids: _ToolCallIds) -> dict[str, Any]:
        message: dict[str, Any] = {"role": TEMPLATE_ROLES[turn.role], "content": turn.text}
        if turn.role == "tool":
            return message | ids.of_result(turn)
        if turn.role != "model":
            return message
        reasoning, key, answer = turn.reasoning, self.beside_key, turn.text
        inside = split_reasoning(turn.text) if REASONING_END in turn.text else None
        if inside is not None and not reasoning:
            key = self.inside_key
            reasoning, answer = inside if key else ("", turn.text)
        key = "tool_plan" if self.has_plans and turn.tool_calls else key
        message["content"] = with_reasoning_inside(reasoning, answer) if reasoning and not key else answer
        if reasoning and key == PARTS:
            texts = [{"type": "text", "text": answer}] if answer else []
            message["content"] = [{"type": "thinking", "thinking": reasoning}, *texts]
        elif reasoning and key:
            message[key] = reasoning
        if turn.tool_calls:
            message["content"] = message["content"] or self.empty_content
            message["tool_calls"] = [self._call(call, id) for call, id in ids.of_calls(turn)]
        return message

    def _call(self, call: ToolCall, id: str | None) -> dict[str, Any]:
        arguments = json.dumps(call.arguments, ensure_ascii=False) if self.arguments_as_json else dict(call.arguments)
        values = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
        return values if id is None else {"id": id, **values}


class _ToolCallIds:
    """The ids of the calls of a conversation, and the calls that its results belong to."""

    def __init__(self, form: CallIds) -> None:
        self.form, self.count = form, 0
        self.open: dict[str | None, tuple[str | None, str]] = {}  # id in the data -> id for the template, name

    def of_calls(self, turn: Turn) -> list[tuple[ToolCall, str | None]]:
        self.open, pairs = {}, list[tuple[ToolCall, str | None]]()
        for call in turn.tool_calls:
            id, named = call.id, f"functions.{call.name}:"
            is_short = id is not None and len(id) == 9 and id.isalnum()
            if (self.form == "short" and not is_short) or (self.form == "filled" and not id):
                id = f"call{self.count:05}"
            elif self.form == "named" and not (id and id.startswith(named)):
                id = f"{named}{self.count}"
            self.count += 1
            self.open[call.id or f"{len(pairs)} of those without an id"] = id, call.name
            pairs.append((call, id))
        return pairs

    def of_result(self, turn: Turn) -> dict[str, str]:
        key = turn.tool_call_id if turn.tool_call_id in self.open else next(iter(self.open), None)
        id, name = self.open.pop(key, (turn.tool_call_id, ""))
        given = {"tool_call_id": id, "name": turn.tool_name or name}
        return {key: value for key, value in given.items() if value}


def sample_tool(name: str, key: str, about: str) -> dict[str, Any]:
    """A declaration of a function with one argument, a string."""
    schema = {"type": "object", "properties": {key: {"type": "string", "description": about}}, "required": [key]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


def template_options(conversation: Conversation, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `apply_chat_template` besides the messages; the row's own variables override those of the run."""
    options = {**template_kwargs, **conversation.template_kwargs}
    return {**options, "tools": [dict(tool) for tool in conversation.tools]} if conversation.tools else options


def replace_strings(value: Any, change: Any) -> Any:
    """The JSON value with `change` applied to each string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): replace_strings(inner, change) for key, inner in value.items()}
    return [replace_strings(inner, change) for inner in value] if isinstance(value, list | tuple) else value
