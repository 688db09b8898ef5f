"""Calls written as elements, their arguments without quotes.

Qwen3-Coder     <function=NAME><parameter=KEY>VALUE</parameter></function>     also behind <tool_call>, <seed:tool_call>
GLM             <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>
MiniMax         <invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>     also with a prefix, as DeepSeek
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.conversation import ToolCall
from finetune.dataset.json_decoder import decode_literal
from finetune.dataset.tool_checks import admits
from finetune.dataset.tool_reading import read_calls

# No element holds another of its kind, so that a text of many openings is read in a moment.
_CALL = re.compile(
    r"<([\w:｜]*)(function|invoke)(?:=|\s+name=)([\"']?)([^<>\"']+)\3>((?:(?!<\1\2[=\s]).)*?)</\1\2>"
    r"|<tool_call>\s*([\w.-]+)\s*(?:<tool_sep>)?((?:(?!<tool_call>).)*?)</tool_call>",
    re.DOTALL,
)
_ARGUMENT = re.compile(
    r"<([\w:｜]*)(parameter|param)(?:=|\s+name=)([\"']?)([^<>\"']+)\3[^<>]*>((?:(?!<\1\2[=\s]).)*?)</\1\2>"
    r"|<arg_key>((?:(?!<arg_key>).)*?)</arg_key>\s*<arg_value>((?:(?!<arg_key>).)*?)</arg_value>",
    re.DOTALL,
)


def element_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[list[ToolCall], str]:
    """The calls in a text, and all of it that belongs to none of them."""
    calls, others, place = list[ToolCall](), list[str](), 0
    for match in _CALL.finditer(text):
        name, body = match[4] or match[6], match[5] or match[7] or ""
        pairs = [(found[4] or found[6], found[5] or found[7] or "") for found in _ARGUMENT.finditer(body)]
        arguments: Mapping[str, Any] = {key: _typed(value, name, key, tools) for key, value in pairs}
        rest = _ARGUMENT.sub("", body) if len(arguments) == len(pairs) else body
        if not pairs and body.lstrip().startswith("{"):  # the arguments as JSON, as Llama 3.1 has them
            read, faults = read_calls({"name": name, "arguments": body})
            arguments, rest = (read[0].arguments, "") if not faults else ({}, body)
        calls.append(ToolCall(name, arguments))
        others += [text[place : match.start()], rest]
        place = match.end()
    return calls, "".join([*others, text[place:]])


def _typed(text: str, name: str, key: str, tools: Sequence[Mapping[str, Any]]) -> Any:
    """The value of an argument: the text where its declaration admits that, else JSON or a Python literal if it is."""
    if len(text) > 1 and text[0] == text[-1] == "\n":
        text = text[1:-1]  # a line of its own
    if text.startswith("<![CDATA[") and text.endswith("]]>"):
        return text[9:-3]
    try:
        value = decode_literal(text)
    except (ValueError, RecursionError):
        return text
    is_text = isinstance(value, str) or admits(json.dumps(tools, default=str), name, key, text)
    return text if is_text else value
