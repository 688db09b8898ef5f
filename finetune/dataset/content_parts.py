"""The content of a turn as a list of parts: texts, reasoning, tool calls and results -> what the turn says.

Anthropic   {"type": "tool_use", "id", "name", "input"}          {"type": "tool_result", "tool_use_id", "content"}
Bedrock     {"toolUse": {"toolUseId", "name", "input"}}          {"toolResult": {"toolUseId", "content": [parts]}}
Gemini      {"functionCall": {"name", "args"}}                   {"functionResponse": {"name", "response": {...}}}
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from finetune.conversation import ToolCall
from finetune.dataset.json_decoder import decode_literal, json_text, shown
from finetune.dataset.tool_reading import is_empty, read_calls, without_struct_nulls

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "tool_plan", "thinking_content")
ONLY_TEXT = "only text is read"
REMEDY = "leave the row out, or write what it says as text"
ORDER = "templates write reasoning first, then text, then calls"
_TEXTS = ("text", "input_text", "output_text")
_CALLS = ("toolUse", "functionCall", "function_call")
_RESULTS = ("toolResult", "functionResponse", "function_response")
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "image_url")
_PARTS = re.compile(r"""\s*(\{\s*['"]parts['"]|\[\s*\{\s*['"](type|text)['"])\s*:""")
PART_KEYS = frozenset(
    {"text", "json", "inlineData", "inline_data", "fileData", "file_data", *MEDIA, *_CALLS, *_RESULTS}
)
_READ = frozenset(
    {"type", "text", "thought", "reasoningContent", "reasoningText", *REASONING_KEYS, *_CALLS, *_RESULTS}
    | {"id", "toolUseId", "tool_use_id", "name", "input", "args", "arguments", "content", "response", "json"}
)


class ContentParts:
    """What the parts of a turn say; a value that is no list of parts is its `text`.

    `results` are (id of the call, name of the function, text). `unread` are keys of parts that are not read.
    """

    def __init__(self, value: Any, field: str) -> None:
        self.text, self.reasoning, self.field = value, "", field
        self.calls: list[ToolCall] = []
        self.results: list[tuple[str | None, str | None, Any]] = []
        self.faults: list[str] = []
        self.fatal: list[str] = []
        self.unread: set[str] = set()
        if field == "parts" and isinstance(value, list):
            value = [{"text": part} if isinstance(part, str) else part for part in value]
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            texts: list[str] = []
            thoughts: list[str] = []
            for number, part in enumerate(value):
                self._read(_given(part), number, texts, thoughts)
            self.text, self.reasoning = "".join(texts), "\n".join(thoughts)

    def _read(self, part: dict[str, Any], number: int, texts: list[str], thoughts: list[str]) -> None:
        kind = part.get("type", "text")
        is_call, is_result = (
            kind in kinds or any(isinstance(part.get(key), dict) for key in kinds)
            for kinds in ((*_CALLS, "tool_use"), (*_RESULTS, "tool_result"))
        )
        has_text = bool("".join(texts).strip())
        holder = _given(next((part[key] for key in (*_CALLS, *_RESULTS) if isinstance(part.get(key), dict)), part))
        self.unread |= {key for one in (part, holder) for key in one.keys() - _READ if not is_empty(one[key])}
        thought = _thought(part, kind)
        if is_call:
            self._call(holder)
        elif is_result:
            if has_text:
                self.faults.append(f'"{self.field}", part {number}: a tool result behind a text: put it in front')
            self._result(holder)
        elif thought is not None:
            if self.calls or has_text:
                self.faults.append(f'"{self.field}", part {number}: reasoning behind text or a call: {ORDER}')
            thoughts.append(thought)
        elif _is_text(part):
            if self.calls and part["text"].strip():
                self.faults.append(f'"{self.field}", part {number}: text behind a call: {ORDER}')
            texts.append(part["text"])
        else:
            self.fatal.append(f'"{self.field}", part {number}: {ONLY_TEXT}, found {shown(part)}: {REMEDY}')

    def _call(self, call: Mapping[str, Any]) -> None:
        own_id = call.get("toolUseId", call.get("id"))
        arguments = next((call[key] for key in ("args", "input", "arguments") if key in call), None)
        calls, faults = read_calls({"name": call.get("name"), "arguments": arguments, "id": own_id})
        self.calls += calls
        self.faults += faults

    def _result(self, result: Mapping[str, Any]) -> None:
        own_id = next((result[key] for key in ("tool_use_id", "toolUseId", "id") if key in result), None)
        said: Any = result.get("content", result.get("response", ""))
        if isinstance(said, list):
            said = "".join(self._text_of_result(part) for part in said)
        elif isinstance(said, dict):
            said = json_text(without_struct_nulls(said))
        self.results.append((own_id, result.get("name"), said))

    def _text_of_result(self, part: Any) -> str:
        if isinstance(part, dict) and part.get("json") is not None:
            return json_text(without_struct_nulls(part["json"]))
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return str(part["text"])
        self.fatal.append(f'"{self.field}", a tool result: {ONLY_TEXT}, found {shown(part)}: {REMEDY}')
        return ""


def _given(part: Mapping[str, Any]) -> dict[str, Any]:
    """The part without the null keys that tables put there."""
    return {key: value for key, value in part.items() if value is not None}


def _is_text(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("text"), str) and (part.get("type") in _TEXTS or _given(part).keys() == {"text"})


def _thought(part: Mapping[str, Any], kind: Any) -> str | None:
    if isinstance(inner := part.get("reasoningContent"), dict):  # Bedrock
        text = inner.get("reasoningText")
        part, kind = text if isinstance(text, dict) else inner, "reasoning"
    if kind in REASONING_KEYS or part.get("thought") is True:
        return next((part[key] for key in ("text", *REASONING_KEYS, "content") if isinstance(part.get(key), str)), None)
    return None


def system_text(value: Any) -> Any:
    """`text_of_parts` of a system prompt, whose parts a table may hold as JSON."""
    if isinstance(value, str) and _PARTS.match(value):
        with suppress(ValueError, RecursionError):
            return text_of_parts(decode_literal(value))
    return text_of_parts(value)


def text_of_parts(value: Any) -> Any:
    """The text of a value that may be a list of text parts, or an object with such a list; other values as they are."""
    if isinstance(value, dict) and isinstance(value.get("parts"), list):
        value = value["parts"]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        if all(map(_is_text, value)):
            return "".join(part["text"] for part in value)
    return value
