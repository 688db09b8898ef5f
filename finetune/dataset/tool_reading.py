"""Tool declarations, calls and results: the forms in which data have them -> the one form of this project."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from finetune.conversation import ToolCall
from finetune.dataset.json_decoder import decode_literal, decode_text, shown
from finetune.dataset.row_checks import surrogate_fault

TOOL_KEYS = ("tools", "functions", "available_tools", "toolConfig")
NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null", False)
# Arguments that are no JSON object: a fault of its own; the call still counts in the order of turns.
UNREADABLE: Mapping[str, Any] = {}
_LISTS = ("functionDeclarations", "function_declarations")  # Gemini's
ARGUMENTS = ("arguments", "parameters", "input", "args")
_SCHEMA_KEYS = ("input_schema", "inputSchema", "parametersJsonSchema", "parameters_json_schema", "arguments")
_MAY_BE_NULL = ("default", "const", "example")
_VALUES_OF_SCHEMAS = (*_MAY_BE_NULL, "enum", "examples")


class StructObject(dict[str, Any]):
    """An object from a struct column of a table: a null key may be one that only other rows have."""


class ToolFault(ValueError):
    """A declaration or call that cannot be read; the message has no place."""


def is_nothing(value: Any) -> bool:
    """Whether a value says that there is none."""
    return ("".join(value.split()) if isinstance(value, str) and len(value) < 16 else value) in NOTHING


def is_empty(value: Any) -> bool:
    """Whether a key with this value need not be named where it is not read."""
    return value is None or value in ("", [], {})


def without_nulls(value: Any, quoting: Collection[str] = ()) -> Any:
    """Leave out the null keys of objects; values under the keys `quoting` stay as they are."""
    if isinstance(value, dict):
        kept = {key: child for key, child in value.items() if child is not None or key in _MAY_BE_NULL and quoting}
        return {key: child if key in quoting else without_nulls(child, quoting) for key, child in kept.items()}
    return [without_nulls(child, quoting) for child in value] if isinstance(value, list) else value


def without_struct_nulls(value: Any) -> Any:
    """Leave out the null keys of an object from a table; other values as they are."""
    return without_nulls(value) if isinstance(value, StructObject) else value


def read_tools(value: Any, unread: list[str] | None = None) -> tuple[dict[str, Any], ...]:
    """Declarations as chat templates take them; a string is read as JSON. Raises `ToolFault`.

    Keys beside the function that are not read are added to `unread`.
    """
    if isinstance(value, str):
        value = _decoded(value, "the declarations")
    if isinstance(value, dict):  # Bedrock's toolConfig, or one function
        value = value.get("tools", [value])
    if not isinstance(value, list):
        raise ToolFault(f"expected a list of declared functions, found {shown(value)}: write one")
    tools: list[Any] = []
    for tool in value:
        tool = _decoded(tool, "a declaration") if isinstance(tool, str) else tool
        listed = [tool[key] for key in _LISTS if isinstance(tool, dict) and isinstance(tool.get(key), list)]
        tools += listed[0] if listed else [tool]
    return tuple(_declaration(tool, unread) for tool in tools)


def declared_tools(row: Mapping[str, Any], unread: list[str]) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """The declarations of a row, and faults without their place; `unread` as in `read_tools`."""
    tools: tuple[Mapping[str, Any], ...] = ()
    faults = []
    for key in TOOL_KEYS:
        if is_nothing(row.get(key)):
            continue
        try:
            read = read_tools(row[key], unread)
        except ToolFault as fault:
            faults.append(f'"{key}": {fault}')
            continue
        if tools and read != tools:
            faults.append(f'has tools under "{key}" and under another key: leave one of them out')
        tools = read
    return tools, faults


def _declaration(tool: Any, unread: list[str] | None) -> dict[str, Any]:
    function: Any = (tool.get("function") or tool.get("toolSpec") or tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip() or tool.get("type") not in (None, "function"):
        raise ToolFault(f'expected declared functions with a "name", found {shown(tool)}: write them so')
    if function is not tool:
        _add_others(unread, tool, ("type", "function", "toolSpec"), "tools")
    function = {"parameters" if key in _SCHEMA_KEYS else key: value for key, value in function.items()}
    function.pop("type", None)
    function = without_nulls(function, () if isinstance(tool, StructObject) else _VALUES_OF_SCHEMAS)
    if not isinstance(function.get("description", ""), str):
        raise ToolFault(f"expected the description of {shown(name)} to be a string")
    parameters = function.get("parameters", {})
    if isinstance(parameters, dict) and parameters.keys() == {"json"} and isinstance(parameters["json"], dict):
        parameters = function["parameters"] = parameters["json"]  # Bedrock's inputSchema
    if not isinstance(parameters, dict):
        raise ToolFault(f"expected the parameters of {shown(name)} to be a JSON Schema, found {shown(parameters)}")
    if parameters and all(isinstance(value, dict) for value in parameters.values()) and "properties" not in parameters:
        function["parameters"] = {"type": "object", "properties": parameters}  # xLAM: the properties alone
    return {"type": "function", "function": function}


def _add_others(unread: list[str] | None, holder: Mapping[str, Any], read: Iterable[str], of: str) -> None:
    """Add the keys with a value beside those that are read."""
    if unread is not None:
        unread += [f"{key} of {of}" for key in holder.keys() - {*read} if not is_empty(holder[key])]


def read_calls(value: Any, unread: list[str] | None = None) -> tuple[list[ToolCall], list[str]]:
    """Calls of OpenAI, of this project or of a JSON text: one, or a list; and faults without their place.

    Keys of calls that are not read are added to `unread`.
    """
    try:
        value = _decoded(value, "the call") if isinstance(value, str) else value
    except ToolFault as fault:
        return [], [str(fault)]
    if value == []:
        return [], ["holds no call, so there is nothing to learn: leave it out"]
    calls, faults = [], []
    for item in value if isinstance(value, list) else [value]:
        call: Any = (item.get("function") or item) if isinstance(item, dict) else None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not name.strip() or item.get("type") not in (None, "function"):
            faults.append(f'expected calls with "name" and "arguments", found {shown(item)}')
            continue
        field = next((key for key in ARGUMENTS if call.get(key) is not None), ARGUMENTS[0])
        _add_others(unread, call, ("name", "id", "type", field), "calls")
        if call is not item:
            _add_others(unread, item, ("function", "id", "type"), "calls")
        own_id = call.get("id") if item.get("id") is None else item["id"]
        if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
            faults.append(f'expected the "id" of a call to be a string, found {shown(own_id)}')
            own_id = None
        try:
            arguments = _arguments(name, call.get(field))
        except ToolFault as fault:
            faults.append(str(fault))
            arguments = UNREADABLE
        calls.append(ToolCall(name, arguments, None if own_id is None else str(own_id)))
    return calls, faults


def _arguments(name: str, value: Any) -> Mapping[str, Any]:
    found = value
    if isinstance(value, str):
        value = _decoded(value, f"the arguments of the call {shown(name)}", decode_text) if value.strip() else {}
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ToolFault(f"expected the arguments of the call {shown(name)} to be a JSON object, found {shown(found)}")
    return value


def _decoded(text: str, what: str, decode: Callable[[str], Any] = decode_literal) -> Any:
    try:
        return decode(text)
    except RecursionError:
        raise ToolFault(f"{what}: nested too deeply") from None
    except ValueError as error:
        raise ToolFault(f"{what} cannot be read as JSON ({error}): {shown(text)}: correct it") from None


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
