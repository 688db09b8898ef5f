"""Tool declarations, calls and results: the forms in which data have them -> the one form of this project."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.conversation import ToolCall, Turn
from finetune.dataset.json_decoder import decode_text, shown
from finetune.dataset.row_checks import surrogate_fault

TOOL_KEYS = ("tools", "functions", "available_tools")
NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null", False)
# Arguments that are no JSON object: a fault of its own; the call still counts in the order of turns.
UNREADABLE: Mapping[str, Any] = {}
_VALUES_OF_SCHEMAS = ("default", "const", "enum", "example", "examples")
_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
_DECLARED = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)


class ToolFault(ValueError):
    """A declaration or call that cannot be read; the message has no place."""


def is_nothing(value: Any) -> bool:
    """Whether a value says that there is none."""
    return (value.strip() if isinstance(value, str) else value) in NOTHING


def without_nulls(value: Any) -> Any:
    """Leave out the null keys that tables put into objects; values that a schema quotes stay."""
    if isinstance(value, dict):
        kept = {key: child for key, child in value.items() if child is not None or key in _VALUES_OF_SCHEMAS}
        return {key: child if key in _VALUES_OF_SCHEMAS else without_nulls(child) for key, child in kept.items()}
    return [without_nulls(child) for child in value] if isinstance(value, list) else value


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Declarations as chat templates take them; a string is read as JSON. Raises `ToolFault`."""
    if isinstance(value, str):
        value = _decoded(value, "the declarations")
    if not isinstance(value, list):
        raise ToolFault(f"expected a list of declared functions, found {shown(value)}")
    return tuple(_declaration(_decoded(tool, "a declaration") if isinstance(tool, str) else tool) for tool in value)


def declared_tools(row: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """The declarations of a row, and faults without their place."""
    tools: tuple[Mapping[str, Any], ...] = ()
    faults = []
    for key in TOOL_KEYS:
        if is_nothing(row.get(key)):
            continue
        try:
            read = read_tools(row[key])
        except ToolFault as fault:
            faults.append(f'"{key}": {fault}')
            continue
        if tools and read != tools:
            faults.append(f'has tools under "{key}" and under another key: leave one of them out')
        tools = read
    return tools, faults


def _declaration(tool: Any) -> dict[str, Any]:
    function: Any = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip() or tool.get("type") not in (None, "function"):
        raise ToolFault(f'expected declared functions with a "name", found {shown(tool)}')
    function = {"parameters" if key == "input_schema" else key: value for key, value in function.items()}
    if function is not tool:
        function.pop("type", None)
    function = without_nulls(function)
    if not isinstance(function.get("description", ""), str):
        raise ToolFault(f"expected the description of {shown(name)} to be a string")
    parameters = function.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ToolFault(f"expected the parameters of {shown(name)} to be a JSON Schema, found {shown(parameters)}")
    if parameters and all(isinstance(value, dict) for value in parameters.values()) and "properties" not in parameters:
        function["parameters"] = {"type": "object", "properties": parameters}  # xLAM: the properties alone
    return {"type": "function", "function": function}


def tools_in_text(text: str) -> tuple[dict[str, Any], ...]:
    """Declarations between `<tools>` and `</tools>` in a system text, as Hermes has them; none if it is not JSON."""
    match = _DECLARED.search(text)
    if match is None:
        return ()
    for items in ([match[1]], match[1].strip().splitlines()):
        try:
            values = [decode_text(item) for item in items]
            return read_tools(values[0] if len(values) == 1 and isinstance(values[0], list) else values)
        except ValueError:
            continue
    return ()


def read_calls(value: Any) -> tuple[list[ToolCall], list[str]]:
    """Calls of OpenAI, of this project or of a JSON text: one, or a list; and faults without their place."""
    try:
        value = _decoded(value, "the call") if isinstance(value, str) else value
    except ToolFault as fault:
        return [], [str(fault)]
    calls, faults = [], []
    for item in value if isinstance(value, list) else [value]:
        call: Any = item.get("function", item) if isinstance(item, dict) else None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not name.strip() or item.get("type") not in (None, "function"):
            faults.append(f'expected calls with "name" and "arguments", found {shown(item)}')
            continue
        arguments = next((call[key] for key in ("arguments", "parameters", "input", "args") if key in call), None)
        own_id = item.get("id", call.get("id"))
        if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
            faults.append(f'expected the "id" of a call to be a string, found {shown(own_id)}')
            own_id = None
        try:
            arguments = _arguments(name, arguments)
        except ToolFault as fault:
            faults.append(str(fault))
            arguments = UNREADABLE
        calls.append(ToolCall(name, arguments, None if own_id is None else str(own_id)))
    return calls, faults


def _arguments(name: str, value: Any) -> Mapping[str, Any]:
    found = value
    if isinstance(value, str):
        value = _decoded(value, f"the arguments of the call {shown(name)}") if value.strip() else {}
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ToolFault(f"expected the arguments of the call {shown(name)} to be a JSON object, found {shown(found)}")
    return value


def _decoded(text: str, what: str) -> Any:
    try:
        return decode_text(text)
    except RecursionError:
        raise ToolFault(f"{what}: nested too deeply") from None
    except ValueError as error:
        raise ToolFault(f"{what} cannot be read as JSON ({error}): {shown(text)}: correct it") from None


def tagged_calls(text: str) -> tuple[str, list[ToolCall], list[str]]:
    """Split a model's text with `<tool_call>{...}</tool_call>` at its end: the text before, the calls, faults."""
    begin = text.find("<tool_call>")
    calls: list[ToolCall] = []
    faults: list[str] = []
    position = begin
    while match := _CALL.match(text, position):
        read, wrong = read_calls(_json_of_literal(match[1]))
        calls, faults, position = [*calls, *read], [*faults, *wrong], match.end()
    if text[position:].strip():
        faults.append(f"text beside a call that cannot be read: {shown(text[position:].strip())}")
    return text[:begin].rstrip(), calls, faults


def _json_of_literal(text: str) -> str:
    """A Python literal as JSON, as some data write calls; any other text as it is."""
    try:
        decode_text(text)
    except RecursionError:
        return text  # reading it says so
    except ValueError:
        try:
            return json.dumps(ast.literal_eval(text.strip()), ensure_ascii=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text  # reading it as JSON says why it is neither
    return text


def python_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
    """Calls of declared functions written as `[name(key=value), ...]`, values as literals; none for any other text."""
    names = [tool["function"]["name"] for tool in tools]
    if not (text.startswith("[") and text.endswith(")]")) or not names:
        return []
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    called: list[str] = []

    def place(match: re.Match[str]) -> str:
        called.append(match[2])
        return f"{match[1]}_("

    try:
        body = ast.parse(re.sub(rf"(^\[|\), ?)({either})\(", place, text), mode="eval").body
        calls = body.elts if isinstance(body, ast.List) else []
        if len(called) != len(calls) or not all(isinstance(call, ast.Call) and not call.args for call in calls):
            return []
        arguments = [{str(word.arg): ast.literal_eval(word.value) for word in call.keywords} for call in calls]  # type: ignore[attr-defined]
        return [ToolCall(*pair) for pair in zip(called, json.loads(json.dumps(arguments)), strict=True)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []


def tagged_results(text: str) -> list[str]:
    """The results in a text of `<tool_response>...</tool_response>` alone; none for any other text."""
    results, position = [], 0
    while match := _RESULT.match(text, position):
        results.append(match[1])
        position = match.end()
    return results if position == len(text) else []


def written_calls(
    turns: Sequence[Turn], numbers: Sequence[int], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Turn], list[int], list[str]]:
    """Read the calls and results that stand in texts; turns, their numbers in the row, faults with their turn."""
    read: list[Turn] = []
    of: list[int] = []
    faults: list[str] = []
    for number, turn in zip(numbers, turns, strict=True):
        found = [turn]
        if turn.role == "model" and "<tool_call>" in turn.text:
            text, calls, wrong = tagged_calls(turn.text)
            faults += [f"turn {number}: {fault}" for fault in wrong]
            found = [replace(turn, text=text, tool_calls=(*turn.tool_calls, *calls))]
        elif turn.role == "model" and not turn.tool_calls and (calls := python_calls(turn.text, tools)):
            found = [replace(turn, text="", tool_calls=tuple(calls))]
        elif turn.role == "human" and "<tool_response>" in turn.text:
            found = [Turn("tool", result) for result in tagged_results(turn.text)] or [turn]
        read += found
        of += [number] * len(found)
    return read, of, faults


def surrogate_fault_in(value: Any, field: str) -> str | None:
    """`surrogate_fault` of the first string with one in a JSON value, keys too."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return next(filter(None, (surrogate_fault(text, field) for text in _strings_in(value))), None)
    return None


def _strings_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for child in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _strings_in(child)
