"""Check tool calls against the declared functions, and their results against the calls."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from finetune.conversation import ToolCall, Turn
from finetune.dataset.json_decoder import shown
from finetune.dataset.tool_reading import UNREADABLE, StructObject, surrogate_fault_in
from finetune.utils.errors import shorten

Numbered = Sequence[tuple[int, Turn]]
SHOWN_ERRORS = 3
NULLS = "null arguments"  # as a key that is not read
_OF_OBJECTS = ("properties", "required")
# Names of types that published declarations have in place of those of JSON Schema; None: any value.
_TYPES = {
    "str": "string", "int": "integer", "float": "number", "double": "number", "bool": "boolean", "dict": "object",
    "list": "array", "tuple": "array", "set": "array", "any": None, "union": None, "optional": None, "callable": None,
    **{name: name for name in ("string", "integer", "number", "boolean", "object", "array", "null")},
}  # fmt: skip
_WORDS = ("description", "title", "$comment")
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SCHEMAS = ("items", "additionalProperties", "not")


def check_tools(
    numbered: Numbered,
    tools: Sequence[Mapping[str, Any]],
    place: str,
    *,
    allows_undeclared: bool = False,
    unread: list[str] | None = None,
) -> tuple[list[tuple[int, Turn]], list[str]]:
    """Check the calls of a row.

    Args:
        tools: the declarations that calls may name.
        allows_undeclared: whether a row without declarations may hold calls, which cannot be checked then.
        unread: gets a remark if null arguments of a table are left out that a declaration allows.

    Returns:
        The turns, without null arguments that no declaration knows, of tables without all that none requires (they put
        them there), and the faults.
    """
    declared, of_declarations = _declared(json.dumps(tools, default=str))
    faults = [f"{place}: {fault}" for fault in of_declarations]
    turns = []
    for number, turn in numbered:
        calls = []
        for call in turn.tool_calls:
            fault = None
            if isinstance(call.arguments, StructObject):
                call, is_sure = _without_struct_nulls(call, declared.get(call.name, ({}, None))[1])
                if unread is not None and not is_sure:
                    unread.append(NULLS)
            if call.name in declared:
                call, fault = _checked(call, declared[call.name])
            elif tools or not allows_undeclared:
                fault = _undeclared(call, declared)
            fault = fault or surrogate_fault_in(call.arguments, "arguments")
            faults += [f"{place}, turn {number}: {fault}"] if fault else []
            calls.append(call)
        turns.append((number, replace(turn, tool_calls=tuple(calls)) if calls else turn))
    repeated = Counter(call.id for _, turn in numbered for call in turn.tool_calls if call.id is not None)
    for own_id, count in repeated.items():
        if count > 1:
            faults.append(f"{place}: has {count} calls with the id {shown(own_id)}: give each call its own")
    return turns, [*faults, *_result_faults(numbered, place)]


def _undeclared(call: ToolCall, declared: Mapping[str, Any]) -> str:
    if declared:
        return (
            f"calls {shown(call.name)}, which is not declared ({', '.join(declared)}): declare it, or correct the name"
        )
    return (
        f'calls {shown(call.name)}, and the row declares no tools: declare them under "tools", or use '
        "--repairs undeclared_tools"
    )


@lru_cache(1024)
def _declared(tools: str) -> tuple[dict[str, tuple[Any, Any]], tuple[str, ...]]:
    """The schema of each function declared in JSON, with its validator (None without or with a bad one); and faults."""
    declared: dict[str, tuple[Any, Any]] = {}
    faults = []
    for tool in json.loads(tools):
        function = tool["function"]
        name, schema = function["name"], function.get("parameters")
        if name in declared:
            faults.append(f"declares {shown(name)} twice: leave one of them out")
        validator = fault = None
        if schema:
            validator, fault = _validator(json.dumps(_for_checks(schema)))
        lone = surrogate_fault_in(tool, f"declaration of {name}") if "\\ud" in tools else None
        for reason in filter(None, (fault, lone)):
            faults.append(f"the declaration of {shown(name)} is no valid JSON Schema: {reason}")
        declared[name] = schema or {}, validator
    return declared, tuple(faults)


def admits(tools: str, name: str, key: str, value: Any) -> bool:
    """Whether a function declared in JSON says of an argument what it may be, and that it may be this value."""
    validator = _declared(tools)[0].get(name, ({}, None))[1]
    schema = validator and validator.schema.get("properties", {}).get(key)
    try:
        return bool(schema) and validator.evolve(schema=schema).is_valid(value)
    except Exception:  # as in `_checked`, which names it
        return False


@lru_cache(4096)
def _validator(schema: str) -> tuple[Any, str | None]:
    """A validator for a schema in JSON, or why it is none. References into the web are not followed."""
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing.jsonschema import EMPTY_REGISTRY

    checked = json.loads(schema)
    kind = validator_for(checked, default=Draft202012Validator)
    try:
        kind.check_schema(checked)
    except SchemaError as error:
        path = ", ".join(map(str, error.absolute_path))
        return None, f"{path}: {error.message}".lstrip(": ")
    except RecursionError:
        return None, "nested too deeply"
    return kind(checked, registry=EMPTY_REGISTRY), None


def _for_checks(schema: Any) -> Any:
    """The schema with the types named as JSON Schema does, without words: declarations that differ in these are one."""
    if not isinstance(schema, dict):
        return schema
    checked: dict[str, Any] = {}
    for key, value in schema.items():
        if isinstance(value, str):
            name = _type_name(value) if key == "type" else value
            if key in _WORDS or name is None:
                continue
            value = name
        elif isinstance(value, dict):
            if key in _OF_SCHEMAS:
                value = {name: _for_checks(child) for name, child in value.items()}
            elif key in _SCHEMAS:
                value = _for_checks(value)
        elif isinstance(value, list):
            if key in _LISTS_OF_SCHEMAS:
                value = [_for_checks(child) for child in value]
        elif key == "required" and isinstance(value, bool):
            continue
        checked[key] = value
    return checked


def _type_name(written: str) -> str | None:
    """The name of a type in JSON Schema; None for any value."""
    head = re.match(r"\w*", written.strip())
    return _TYPES.get(head[0].lower(), written) if head else written


def _without_struct_nulls(call: ToolCall, validator: Any) -> tuple[ToolCall, bool]:
    """The call without null arguments that need not be its own, and whether none that it leaves out may be meant."""
    unsure: list[str] = []

    def kept(value: Any, schema: Any) -> Any:
        if isinstance(value, list):
            return [kept(item, schema.get("items") if isinstance(schema, dict) else None) for item in value]
        if not isinstance(value, dict):
            return value
        properties, required = ((schema if isinstance(schema, dict) else {}).get(key, ()) for key in _OF_OBJECTS)
        for name in [name for name, child in value.items() if child is None and name not in required]:
            is_free = validator is None or not properties
            if is_free or (name in properties and validator.evolve(schema=properties[name]).is_valid(None)):
                unsure.append(name)
        return {
            name: kept(child, properties[name] if name in properties else None)
            for name, child in value.items()
            if child is not None or name in required
        }

    return replace(call, arguments=kept(call.arguments, validator and validator.schema)), not unsure


def _checked(call: ToolCall, declaration: tuple[Any, Any]) -> tuple[ToolCall, str | None]:
    """The call without null arguments that its schema does not know; and why the others do not fit."""
    schema, validator = declaration
    if call.arguments is UNREADABLE or validator is None:
        return call, None
    try:
        if None in call.arguments.values():
            properties = validator.schema.get("properties", {})
            allowed = {name for name, child in properties.items() if validator.evolve(schema=child).is_valid(None)}
            kept = {name: value for name, value in call.arguments.items() if value is not None or name in allowed}
            call = replace(call, arguments=kept)
        errors = [*validator.iter_errors(call.arguments)]
    except RecursionError:
        return call, f"the declaration of {shown(call.name)} refers to itself without end: correct it"
    except Exception as error:  # a reference that leads nowhere, a broken pattern: each library has its own error
        return call, f"the declaration of {shown(call.name)} cannot be applied ({error}): correct it"
    if not errors:
        return call, None
    reasons = [": ".join([*map(str, error.absolute_path), shown_reason(error.message)]) for error in errors]
    more = [f"and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
    return call, (
        f"calls {shown(call.name)} with arguments that do not fit its declaration: "
        f"{'; '.join([*reasons[:SHOWN_ERRORS], *more])}: correct the arguments or the declaration"
    )


def shown_reason(text: str) -> str:
    """A reason of another library on one line, of a length that fits a message."""
    return shorten(" ".join(text.encode("utf-8", "backslashreplace").decode().split()), 160)


def _result_faults(numbered: Numbered, place: str) -> list[str]:
    """Faults in how results follow calls: each call of a turn has its result in the tool turns right after it."""
    faults: list[str] = []
    calls: tuple[ToolCall, ...] = ()
    waiting: list[ToolCall] = []
    called_at = num_results = 0

    def close() -> None:
        # One result without an id may hold those of several calls without ids.
        if waiting and not (num_results == 1 and all(call.id is None for call in calls)):
            names = ", ".join(shown(call.name if call.id is None else f"{call.name} ({call.id})") for call in waiting)
            faults.append(
                f"{place}, turn {called_at}: calls {names} without a result: add a tool turn with it right after the "
                "call, or leave the call out"
            )

    for number, turn in numbered:
        if turn.role == "tool":
            fault = _misplaced(turn, calls, waiting)
            faults += [f"{place}, turn {number}: {fault}"] if fault else []
            num_results += 1
        else:
            close()
            calls, waiting = turn.tool_calls, [*turn.tool_calls]
            called_at, num_results = number, 0
    if numbered and numbered[-1][1].role == "tool":
        close()
    return faults


def _misplaced(turn: Turn, calls: Sequence[ToolCall], waiting: list[ToolCall]) -> str | None:
    """Why a tool turn is no result of the calls; takes the call that it answers out of those that wait."""
    if not calls:
        return "a tool result without a call right before it: add the call to the model turn, or leave the result out"
    if turn.tool_call_id is not None:
        call = next((call for call in calls if call.id == turn.tool_call_id), None)
        if call is None:
            del waiting[:1]  # which it may be meant for
            own_id = shown(turn.tool_call_id)
            return f"the result of the call {own_id}, and no call before it has that id: correct it, or leave it out"
        if call not in waiting:
            return f"a second result of the call {shown(turn.tool_call_id)}: leave one of them out"
    elif not waiting:
        return "a tool result more than there are calls before it: leave it out"
    else:
        call = next((call for call in waiting if turn.tool_name in (None, call.name)), waiting[0])
    waiting.remove(call)
    if turn.tool_name not in (None, call.name):
        name = shown(call.name)
        return f"the result of {shown(turn.tool_name)}, and the call before it is of {name}: correct one of them"
    return None
