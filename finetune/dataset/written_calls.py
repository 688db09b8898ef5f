"""Tool declarations, calls and results that stand in the texts of turns.

Others      <TOOLCALL>[{"name": ..., "arguments": {...}}]</TOOLCALL>   <functioncall> {...}   [TOOL_CALLS] [...]
Hermes      <tools>[...]</tools>   <tool_call>{"name": ..., "arguments": {...}}</tool_call>   <tool_response>
ToolACE     a JSON list of functions in the system text     [name(key="value"), other_name()]
Elements    as Qwen3-Coder, GLM and MiniMax write them: call_elements.py
"""

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.conversation import ToolCall, Turn
from finetune.dataset.call_elements import element_calls
from finetune.dataset.json_decoder import decode_text, shown
from finetune.dataset.tool_reading import ToolFault, read_calls, read_tools

_CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>", re.DOTALL)
# What models write in front of calls, also of calls in syntaxes that are not read.
_TAG = r"[^<>\s]*(?:tool|function|TOOL)[_▁]?(?:call|CALL)[^<>\s]*>"
_MARKER = re.compile(
    rf"<{_TAG}|<[\w:｜]*(?:function=|(?:function|invoke)\s+name=)|\[TOOL_CALLS\]|functools(?=\[)"
    r"|<\|(?:python_tag|python_start|tools_prefix|START_ACTION|open\|>tools<\|sep)\|>|<\|channel\|>commentary"
)
_AT_END = re.compile(rf"(?:<{_TAG}|<\|endoftext\|>|<\|eo[mt]_id\|>|</s>)?\s*$")
_TAGS = re.compile(rf"<{_TAG}|<\|endoftext\|>|<\|eo[mt]_id\|>|</s>|\s")
_RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
_DECLARED = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_LIST = re.compile(r"\[\s*\{")
_NAME = re.compile(r"\s*([^\W\d][^\[\](){}=,'\"\n]*)\(")
# A string; the key of an argument, which need be no name of Python; a literal as JSON has it; a bracket.
_TOKEN = re.compile(
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(?<=[(,\s])([^\W\d][\w.$-]*)(?=\s*=(?!=))|\b(true|false|null)\b|([()])""",
    re.DOTALL,
)
_LISTED = re.compile(r"\[" + _NAME.pattern)
_NEXT_CALL, _LAST_CALL = re.compile(r"\s*,"), re.compile(r"\s*\]")
_LITERALS = {"true": "True", "false": "False", "null": "None"}
BEHIND_CALL = "text behind a call, where no template writes it: {}: put it in front of the call"
_UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


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


def tools_in_prose(text: str) -> tuple[dict[str, Any], ...]:
    """The first JSON list of declarations in a text, as ToolACE has it; none if there is none."""
    for match in _LIST.finditer(text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, match.start())
            if all(isinstance(tool, dict) and ("parameters" in tool or "function" in tool) for tool in value):
                return read_tools(value)
        except (ToolFault, ValueError, RecursionError):
            continue
    return ()


def tagged_calls(text: str, begin: int, unread: list[str]) -> tuple[list[ToolCall], list[str]]:
    """The calls of a model's text that ends with `<tool_call>{...}</tool_call>` from `begin` on, and faults.

    Keys of calls that are not read are added to `unread`.
    """
    calls: list[ToolCall] = []
    faults: list[str] = []
    position = begin
    while match := _CALL.match(text, position):
        read, wrong = read_calls(match[1], unread)
        calls, position = [*calls, *read], match.end()
        faults += [f'{fault}, or write the call under "tool_calls"' for fault in wrong]
    if rest := text[position:].strip():
        unclosed = f"<tool_call> without </tool_call>: {shown(rest)}: close it, or leave the row out"
        faults.append(unclosed if rest.startswith("<tool_call>") else BEHIND_CALL.format(shown(rest)))
    return calls, faults


def declared_in_text(
    turns: Sequence[Turn], numbers: Sequence[int], beside: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    """Declarations in the system turn, and a fault with its turn; `beside` are those beside the turns."""
    system = turns[0].text if turns and turns[0].role == "system" else ""
    if tools := tools_in_text(system):
        is_other = beside and beside != tools
        return tools, ": declares tools in its system turn (<tools>) and others beside it" if is_other else None
    listed = {
        number: first_python_call(turn.text)
        for number, turn in zip(numbers, turns, strict=True)
        if turn.role == "model" and not beside and _LISTED.search(turn.text)
    }
    has_calls = bool(listed) or (not beside and any(turn.tool_calls for turn in turns))
    tools = tools_in_prose(system) if has_calls else ()
    whole = next((number for number, name in listed.items() if name), None)
    if tools or whole is None or not ("function" in system.lower() or any(turn.role == "tool" for turn in turns)):
        return tools, None
    return (), (
        f", turn {whole}: writes calls as [name(key=value)], and no declarations are found: declare the "
        'functions under "tools"'
    )


def first_python_call(text: str) -> str | None:
    """The first name of a text that is written `[name(...)]`, behind reasoning or not; None of any other text."""
    text = _behind_reasoning(text)
    match = _NAME.match(text, 1) if text.startswith("[") and text.endswith("]") else None
    match = match if match and text[:-1].rstrip().endswith(")") else None
    return match[1].strip() if match else None


def _behind_reasoning(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def python_calls(text: str, begin: int = 0) -> tuple[list[ToolCall], int]:
    """Calls written as `[name(key=value), ...]` with literals as values, and where they end; none at other places."""
    calls: list[ToolCall] = []
    place = begin + 1
    try:
        while match := _NAME.match(text, place):
            arguments, place = _python_arguments(text, match.end())
            calls.append(ToolCall(match[1].strip(), arguments))
            if closing := _LAST_CALL.match(text, place):
                return calls, closing.end()
            following = _NEXT_CALL.match(text, place)
            place = following.end() if following else len(text)
    except _UNREADABLE:
        return [], begin
    return [], begin


def json_calls(text: str, declared: Collection[str], unread: list[str]) -> list[ToolCall]:
    """Calls of declared functions as JSON, behind reasoning or not, and nothing else; none for any other text."""
    text = _behind_reasoning(text)
    try:
        values = decode_text(text) if text[:1] in ("{", "[") and text[-1:] in ("}", "]") else []
    except (ValueError, RecursionError):
        return []
    for value in values if isinstance(values, list) else [values]:
        function: Any = value.get("function", value) if isinstance(value, dict) else None
        named = isinstance(function, dict) and any(key in function for key in ("arguments", "parameters"))
        if not named or function.get("name") not in declared:
            return []
    return read_calls(values, unread)[0]


def bracketed_calls(text: str, declared: Collection[str]) -> tuple[str, list[ToolCall], list[str]]:
    """Split a text with `[name(key=value)]` at its end: the text before, the calls, faults."""
    if is_whole := first_python_call(text):
        begins = [text.index("[", text.rfind("</think>") + 1)]
    else:
        begins = [match.start() for match in _LISTED.finditer(text) if match[1].strip() in declared]
    may_end = text.rstrip().endswith("]")
    for begin in begins:
        head = text[:begin].rstrip()
        is_behind_text = bool(_behind_reasoning(head))
        if is_behind_text and not may_end:  # no call, whatever it reads: a text may hold thousands
            continue
        calls, end = python_calls(text, begin)
        rest = text[end:].strip()
        if calls and not rest:
            return head, calls, []
        if calls and not is_behind_text:
            return text, [], [BEHIND_CALL.format(shown(rest))]
        if not calls and is_whole in declared:
            remedy = "write one list, with literals as values"
            return text, [], [f"a call that cannot be read as [name(key=value)]: {shown(text[begin:])}: {remedy}"]
    return text, [], []


def _python_arguments(text: str, begin: int) -> tuple[Mapping[str, Any], int]:
    """The keyword arguments that begin behind a "(", and the place behind its ")"; a `ValueError` if there are none."""
    depth, place, keys, parts = 1, begin, list[str](), ["f("]
    for match in _TOKEN.finditer(text, begin):
        parts.append(text[place : match.start()])
        place = match.end()
        if match[2]:
            keys.append(match[2])
        parts.append(f"_{len(keys) - 1}" if match[2] else _LITERALS.get(match[3], match[0]))
        depth += {"(": 1, ")": -1}.get(match[4], 0)
        if not depth:
            break
    call = ast.parse("".join(parts), mode="eval").body
    names = [str(word.arg) for word in call.keywords] if isinstance(call, ast.Call) and not call.args else [""]
    if names != [f"_{number}" for number in range(len(keys))] or len({*keys}) != len(keys):
        raise ValueError("other than keyword arguments")
    values = [ast.literal_eval(word.value) for word in call.keywords]  # type: ignore[attr-defined]
    return decode_text(json.dumps(dict(zip(keys, values, strict=True)), ensure_ascii=False)), place


def tagged_results(text: str) -> list[str]:
    """The results in a text of `<tool_response>...</tool_response>` alone; none for any other text."""
    results, position = [], 0
    while match := _RESULT.match(text, position):
        results.append(match[1])
        position = match.end()
    return results if position == len(text) else []


def _split(text: str, tools: Sequence[Mapping[str, Any]], unread: list[str]) -> tuple[str, list[ToolCall], list[str]]:
    """Split a model's text: the text before its calls, the calls, faults."""
    begin = text.find("</think>") + 1 if text.lstrip().startswith("<think>") else 0
    if marker := _MARKER.search(text, begin):
        head, said = text[: marker.start()].rstrip(), text[marker.start() :]
        written = _AT_END.sub("", text[marker.end() :]).strip()
        if marker[0] == "<tool_call>":
            calls, faults = tagged_calls(text, marker.start(), unread)
        elif first_python_call(written) is not None and python_calls(written)[0]:
            calls, faults = python_calls(written)[0], []
        else:
            calls, faults = read_calls(written, unread)
            faults = [f'{shown(marker[0])}: {fault}: write calls as JSON, or under "tool_calls"' for fault in faults]
        if faults and (elements := element_calls(said, tools))[0]:
            calls, rest = elements
            faults = [BEHIND_CALL.format(shown(rest.strip()))] if _TAGS.sub("", rest) else []
        return head, calls, faults
    if not ("[" in text or '"name"' in text):
        return text, [], []
    names = {tool["function"]["name"] for tool in tools}
    if calls := json_calls(text, names, unread):
        return text[: text.rfind("</think>") + len("</think>")] if "</think>" in text else "", calls, []
    return bracketed_calls(text, names)


def written_calls(
    turns: Sequence[Turn], numbers: Sequence[int], tools: Sequence[Mapping[str, Any]], unread: list[str]
) -> tuple[list[Turn], list[int], list[str]]:
    """Read the calls and results that stand in texts; turns, their numbers in the row, faults with their turn.

    Keys of calls that are not read are added to `unread`.
    """
    read: list[Turn] = []
    of: list[int] = []
    faults: list[str] = []
    for number, turn in zip(numbers, turns, strict=True):
        found = [turn]
        if turn.role == "model" and (not turn.tool_calls or "<tool_call>" in turn.text):
            text, calls, wrong = _split(turn.text, tools, unread)
            faults += [f"turn {number}: {fault}" for fault in wrong]
            repeats = [replace(call, id=None) for call in turn.tool_calls] == calls  # as logs of servers do
            own = turn.tool_calls if repeats else (*turn.tool_calls, *calls)
            found = [replace(turn, text=text, tool_calls=own)] if calls else found
        elif turn.role == "human" and "<tool_response>" in turn.text:
            found = [Turn("tool", result) for result in tagged_results(turn.text)] or [turn]
        read += found
        of += [number] * len(found)
    return read, of, faults
