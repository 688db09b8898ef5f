"""One turn of a row -> `Turn`: its role, its text or parts, reasoning, tool calls and weight."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune.conversation import Role, ToolCall, Turn
from finetune.dataset.content_parts import MEDIA, ONLY_TEXT, PART_KEYS, REASONING_KEYS, REMEDY, ContentParts
from finetune.dataset.json_decoder import decode_text, json_text, shown
from finetune.dataset.row_checks import is_blank, text_fault
from finetune.dataset.row_verdicts import ROW_WEIGHTS, VERDICTS_OF_TURNS, is_remark, verdict_faults
from finetune.dataset.tool_reading import is_empty, is_nothing, read_calls
from finetune.dataset.written_calls import tagged_results

ROLES: dict[str, Role] = {
    "human": "human", "user": "human", "prompter": "human",
    "model": "model", "gpt": "model", "assistant": "model", "bot": "model", "chatbot": "model", "chatgpt": "model",
    "bing": "model", "ai": "model", "system": "system", "developer": "system",
    "function_call": "model", "tool_call": "model",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
    "tool_result": "tool", "function_response": "tool", "environment": "tool",
    "text": "text",
}  # fmt: skip
ACCEPTED_ROLES = "accepted as human: user; as model: gpt, assistant, bot, chatgpt; as tool: function, observation"
# The text of a turn of these roles is a call, or a list of calls, as JSON.
CALL_ROLES = ("function_call", "tool_call")
PLAIN_ROLES = {
    name: role for name, role in ROLES.items() if role in ("human", "model", "system") and name not in CALL_ROLES
}
TURN_KEYS = {"role": "content", "from": "value"}  # the key of the role -> the usual key of the text
TEXT_KEYS = ("content", "parts", "value", "text")
CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls")
WEIGHTS = ("weight", "loss_weight", "loss", "loss_scale", "loss_mask", "train")
ONLY_LAST = ("only_last_turn_loss", "mask_history")  # of a row: its last answer alone is supervised
ONLY_WHOLE_TURNS = "a turn is supervised as a whole"
# Variables of chat templates that may stand in a row itself.
TEMPLATE_VARIABLES = ("enable_thinking", "reasoning_effort")
# Options of `apply_chat_template`, and names that it needs itself.
NOT_VARIABLES = frozenset(
    "messages conversation tools chat_template template tokenizer self add_generation_prompt continue_final_message "
    "tokenize padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "processor_kwargs options".split()
)
# What a text chat cannot hold: a value under one of these keys is a fault, never dropped silently.
REFUSED = {
    **dict.fromkeys(MEDIA, ONLY_TEXT),
    **dict.fromkeys(("train_detail", "prefix", "partial"), ONLY_WHOLE_TURNS),
    **dict.fromkeys(("mask", "masked"), 'write "train": false for turns that are context'),
    **dict.fromkeys(("tools", "functions"), "tools are declared by the row, not by a turn"),
}
REASONING_LISTS = ("reasoning_details", "thinking_blocks")  # of parts: OpenRouter's, and Anthropic's beside the text
_OBJECT = re.compile(r"""\s*\{\s*["'].*\}\s*""", re.DOTALL)
_MODES = frozenset("on off true false yes no none auto enabled disabled minimal low medium high".split())
_READ = frozenset({*TURN_KEYS, *TEXT_KEYS, *REASONING_KEYS, *REASONING_LISTS, *CALL_KEYS, *WEIGHTS})
READ_IN_TURNS = _READ | {"tool_call_id", "name", *REFUSED, *VERDICTS_OF_TURNS}


def role_of(name: Any) -> Role | None:
    """The role that a name in the data stands for, upper and lower case alike."""
    return (ROLES.get(name) or ROLES.get(_plain_name(name))) if isinstance(name, str) else None


def _plain_name(role: str) -> str:
    return re.sub(r"[\s-]+", "_", role.lower())


class TurnReading:
    """One turn of a row: what it says as turns, several where it holds several tool results, and its faults.

    `role_key` is the key under which it has its role, `role_name` the role as written; `calls_only` tells a turn of
    `CALL_ROLES`, which continues a model turn before it; `unread` are keys with values that are not read.
    """

    def __init__(self, turn: Any, place: str, *, ignores_verdicts: bool = False) -> None:
        self.place = place
        self.turns: list[Turn] = []
        self.faults: list[str] = []
        self.is_complete, self.calls_only = True, False
        self.role_key: str | None = None
        self.role_name: str | None = None
        self.unread: list[str] = []
        turn = _with_usual_keys(turn)
        if not isinstance(turn, dict):
            self._add_fatal(f'expected an object with "from" and "value", found {shown(turn)}')
            return
        if turn.get("type") in ("function_call", "function_call_output", "reasoning") and turn.get("role") is None:
            if turn["type"] == "reasoning":
                if turn.get("summary") or turn.get("content"):
                    self._add_fatal('an item with reasoning: write it as "reasoning_content" of the message')
                return
            turn = _turn_of_item(turn)
        role_key, field = self._keys(turn)
        self.role_key = role_key
        if field is None:
            return
        role = self._role(turn.get(role_key))
        if role == "model" and not ignores_verdicts:
            self.faults += verdict_faults(turn, _present(turn, VERDICTS_OF_TURNS), place)
        self.faults += refusals(turn, _present(turn, REFUSED), REFUSED, place)
        self.unread = [key for key in turn.keys() - READ_IN_TURNS if not is_empty(turn[key])]
        self.unread += [key for key in _present(turn, VERDICTS_OF_TURNS) if is_remark(key, turn[key])]
        if turn.get("channel") in ("analysis", "commentary"):
            self._add_fatal('a "channel" of gpt-oss: write it as "reasoning_content" or "tool_calls" of the answer')
        self._read(turn, role, field)

    def _add(self, fault: str) -> None:
        self.faults.append(f"{self.place}: {fault}")

    def _add_fatal(self, fault: str) -> None:
        self._add(fault)
        self.is_complete = False

    def _keys(self, turn: dict[str, Any]) -> tuple[str, str | None]:
        """The keys of the role and of the text; no key of the text if they contradict each other."""
        roles, texts = ([key for key in keys if turn.get(key) is not None] for keys in (TURN_KEYS, TEXT_KEYS))
        role_key = roles[0] if roles else "role" if {*texts} & {"content", "parts"} else "from"
        if len(roles) > 1 and turn["role"] != turn["from"]:
            self._add_fatal('has keys of both "from" and "role": leave one of them out')
            return role_key, None
        if len(texts) > 1 and any(turn[key] != turn[texts[0]] for key in texts):
            self._add_fatal(f"has both {' and '.join(map(shown, texts))}: leave one of them out")
            return role_key, None
        return role_key, texts[0] if texts else TURN_KEYS[role_key]

    def _role(self, name: Any) -> Role | None:
        role = role_of(name)
        if role is None or role == "text":
            self._add_fatal(
                f'expected "{self.role_key}" to be human, model, system or tool, found {shown(name)} ({ACCEPTED_ROLES})'
            )
            return None
        self.role_name = name
        self.calls_only = _plain_name(name) in CALL_ROLES
        return role

    def _read(self, turn: dict[str, Any], role: Role | None, field: str) -> None:
        given, was_complete, calls = turn.get(field), self.is_complete, list[ToolCall]()
        is_json = (role == "tool" or self.calls_only) and _is_json_value(given)
        if is_json and self.calls_only:
            calls, given = self._read_calls(given), ""
        elif is_json:
            given = json_text(given)
        parts = ContentParts(given, field)
        for wrong in parts.faults:
            self._add(wrong)
        for wrong in parts.fatal:
            self._add_fatal(wrong)
        self.unread += [f"{key} of parts" for key in parts.unread]
        value, calls = parts.text, [*calls, *parts.calls, *self._calls(turn)]
        if was_complete and not self.is_complete and is_empty(value):
            return
        if parts.results and self._add_results(parts, role, field) and is_blank(value):
            self._result_of(turn, role)  # names the keys that are not read
            return
        if self.calls_only and isinstance(value, str) and not is_json:
            head, end, rest = value.partition("</think>") if value.lstrip().startswith("<think>") else ("", "", value)
            calls, value = [*calls, *self._read_calls(rest)], head + end
        if calls and role not in ("model", None):
            self._add(f"has tool calls, but only a model turn calls: {REMEDY}")
        reasoning = self._reasoning(turn, parts.reasoning, role)
        is_in_text = isinstance(value, str) and value.lstrip().startswith(reasoning.strip())
        if reasoning and is_in_text and turn.get("thought"):  # traces of agents repeat it in the text
            self.unread += [key for key in REASONING_KEYS if turn.get(key)]
            reasoning = ""
        is_supervised, weight = self._weight(turn, role)
        result_of = self._result_of(turn, role)
        if role == "model" and value in (None, "") and (calls or not self.is_complete):
            self.turns.append(Turn("model", "", is_supervised, reasoning, tuple(calls), weight=weight))
            return
        if role == "system" and is_empty(value):
            if is_empty(value := turn.get("system_prompt")):
                return
            self.unread.remove("system_prompt")
        may_be_blank = isinstance(value, str) and (bool(calls) if role == "model" else role == "tool")
        if not (may_be_blank and is_blank(value)) and (fault := text_fault(value, field)) is not None:
            self._add_fatal(fault)
            return
        for text in (tagged_results(value) if role == "tool" else []) or [value]:
            self.turns.append(Turn(role or "human", text, is_supervised, reasoning, tuple(calls), *result_of, weight))

    def _add_results(self, parts: ContentParts, role: Role | None, field: str) -> bool:
        """Add the results of tools among the parts as turns of their own, in front of the text of a human turn."""
        if role not in ("human", "tool") or (role == "tool" and not is_blank(parts.text)):
            self._add_fatal(f'"{field}" has tool results in a {role} turn{" beside text" * (role == "tool")}: {REMEDY}')
            return False
        for own_id, name, text in parts.results:
            if text != "" and (fault := text_fault(text, "tool result")) is not None:
                self._add_fatal(fault)
                continue
            of_call = self._result_of({"tool_call_id": own_id, "name": name}, "tool")
            self.turns.append(Turn("tool", text, True, "", (), *of_call))
        return True

    def _calls(self, turn: dict[str, Any]) -> list[ToolCall]:
        given = [key for key in CALL_KEYS if not is_nothing(turn.get(key))]
        return [call for key in given for call in self._read_calls(turn[key], f'"{key}": ')]

    def _read_calls(self, value: Any, field: str = "") -> list[ToolCall]:
        calls, faults = read_calls(value, self.unread)
        self.is_complete &= bool(calls)
        for fault in faults:
            self._add(field + fault)
        return calls

    def _reasoning(self, turn: dict[str, Any], thought: str, role: Role | None) -> str:
        keys = (*REASONING_KEYS, *REASONING_LISTS)
        reasoning, fault = read_reasoning({"parts": thought} | {key: turn[key] for key in keys if key in turn})
        if reasoning and role not in ("model", None):
            fault = f"has reasoning, but only a model turn reasons: {REMEDY}"
        if fault is not None:
            self._add(fault)
        return reasoning

    def _result_of(self, turn: dict[str, Any], role: Role | None) -> tuple[str | None, str | None]:
        """The id of the call and the name of the function whose result a tool turn is."""
        own_id: Any = turn.get("tool_call_id")
        name: Any = turn.get("name")
        if isinstance(own_id, int) and not isinstance(own_id, bool):
            own_id = str(own_id)
        if role == "tool":
            for key, value in (("tool_call_id", own_id), ("name", name)):
                if value is not None and (not isinstance(value, str) or text_fault(value, key)):
                    self._add(f'expected "{key}" to be a string, found {shown(value)}')
                    return None, None
            return own_id, name
        if not is_nothing(own_id):
            self._add(f'has "tool_call_id": {shown(own_id)}, but only a tool turn is a result: leave it out')
        if not is_nothing(name):
            self.unread.append("name")
        return None, None

    def _weight(self, turn: dict[str, Any], role: Role | None) -> tuple[bool, float]:
        if len(turn) == 2:
            return True, 1.0
        found = {key: _flag(turn[key]) for key in WEIGHTS if turn.get(key) is not None}
        weights = {}
        for key, value in found.items():
            if (fault := weight_fault(value, key)) is not None:
                self._add(fault)
            elif role not in ("model", None) and (value is True or number_of(value) not in (0, 1)):
                self._add(f'has "{key}": {shown(value)}, but only model turns are supervised: leave it out')
            else:
                weights[key] = number_of(value)
        if role not in ("model", None):
            return True, 1.0
        train = weights.pop("train", None)
        if len({*weights.values()} - {1.0}) > 1 or (train and 0 in weights.values()):
            self._add(f"{' and '.join(map(shown, found))} say different things: leave one of them out")
        weight = min({*weights.values()} - {1.0}, default=1.0)
        return train != 0 and weight != 0, weight or 1.0


def _with_usual_keys(turn: Any) -> Any:
    """A turn that is written {role: text} or [role, text] under the usual keys; other values as they are."""
    if isinstance(turn, list | tuple) and len(turn) == 2 and role_of(turn[0]) not in (None, "text"):
        return {"from": turn[0], "value": turn[1]}
    if isinstance(turn, dict) and turn.keys().isdisjoint((*TURN_KEYS, *TEXT_KEYS, "type")):
        given = {key: value for key, value in turn.items() if value is not None}
        names = [key for key in given if role_of(key)]
        if len(names) == 1:
            return {"from": names[0], "value": given.pop(names[0])} | given
    return turn


def _turn_of_item(item: Mapping[str, Any]) -> dict[str, Any]:
    """A call or a result, as OpenAI's Responses API has them beside messages, as a turn."""
    if item["type"] == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments"), "id": item.get("call_id")}
        return {"from": "tool_call", "value": call}
    return {"from": "tool", "value": item.get("output"), "tool_call_id": item.get("call_id")}


def _is_json_value(value: Any) -> bool:
    """Whether a result or a call is written as a JSON value in place of its text, and is no part or list of parts."""
    items = value if isinstance(value, list) else [value]
    is_part = (
        isinstance(item, dict) and (item.get("type", "function") != "function" or not PART_KEYS.isdisjoint(item))
        for item in items
    )
    return isinstance(value, dict | list | int | float) and not any(is_part)


def read_reasoning(holder: Mapping[str, Any]) -> tuple[str, str | None]:
    """The reasoning under one key of the holder, or under several that say the same; and a fault without its place."""
    found = {key: value for key, value in holder.items() if not is_nothing(value)}
    for key in REASONING_LISTS:
        if isinstance(found.get(key), list):
            given, found[key] = found[key], "\n".join(filter(None, map(_thought_in, found[key])))
            if not found[key] and len(found) > 1:
                del found[key]  # signatures and the like
            elif not found[key]:
                return "", f'has reasoning under "{key}" that is no text, found {shown(given)}: leave it out'
    for key, value in found.items():
        fault = f'has "{key}": {shown(value)}, which is no reasoning: leave it out' if is_mode(value) else None
        if (fault := fault or text_fault(value, key)) is not None:
            return "", fault
    if len({"".join(value.split()) for value in found.values()}) > 1:
        return "", f"has reasoning under {' and '.join(found)}, which differ: leave one of them out"
    return next(iter(found.values()), ""), None


def is_mode(value: Any) -> bool:
    """Whether a value under a key of reasoning says how to reason, not what."""
    if isinstance(value, str):
        return value.strip().casefold() in _MODES or _OBJECT.fullmatch(value) is not None
    return isinstance(value, bool | dict)


def _thought_in(part: Any) -> str | None:
    """The text of a part of reasoning; None of one without, such as an encrypted one."""
    texts = (part.get(key) for key in ("text", "summary", "thinking")) if isinstance(part, dict) else ()
    return next((text for text in texts if isinstance(text, str)), None)


def weight_fault(value: Any, key: str) -> str | None:
    """Why a value is no weight of a loss; None if it is one."""
    if isinstance(value, bool):
        return None
    if key == "train":
        return f'expected "train" to be true or false, found {shown(value)}'
    if isinstance(value, int | float | str) and math.isfinite(number := number_of(value)) and 0 <= number <= 1e6:
        return None
    return f'expected "{key}" to be a number of 0 or more, or true or false, found {shown(value)}'


def number_of(value: Any) -> float:
    """A weight as a number, also from a table of texts; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _flag(value: Any) -> Any:
    """A value that is true or false, also from a table of texts; other values as they are."""
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def apply_weights(turns: list[Turn], row: Mapping[str, Any]) -> list[str]:
    """Apply the weight of a row, and the rule that its last answer alone is supervised; faults without their place."""
    given = {key: row[key] for key in ROW_WEIGHTS if row.get(key) not in (None, 0, "")}
    faults = [fault for key, value in given.items() if (fault := weight_fault(value, key))]
    weight = 1.0 if faults else math.prod(map(number_of, given.values()))
    flags = {key: _flag(row[key]) for key in ONLY_LAST if row.get(key) is not None}
    faults += [f'expected "{key}" to be true or false' for key, flag in flags.items() if not isinstance(flag, bool)]
    last_only = True in flags.values()
    last = max((index for index, turn in enumerate(turns) if turn.role == "model"), default=0)
    for index, turn in enumerate(turns if weight != 1 or last_only else ()):
        if turn.role in ("model", "text"):
            train = turn.train and (not last_only or index == last)
            turns[index] = replace(turn, train=train, weight=turn.weight * weight)
    return faults


def refusals(holder: Mapping[str, Any], keys: list[str], reasons: Mapping[str, str], place: str) -> list[str]:
    """A fault for each reason for which values of a row or a turn cannot be read; those of other rows read the same."""
    by_reason: dict[str, list[str]] = {}
    for key in sorted(keys):
        if not is_nothing(holder[key]):
            by_reason.setdefault(reasons[key], []).append(f'"{key}"')
    return [f"{place}: has {' and '.join(keys)}: {reason}: {REMEDY}" for reason, keys in by_reason.items()]


def template_kwargs_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The variables that a row has for the chat template, an object or its JSON; and a fault without its place."""
    value = row.get("chat_template_kwargs")
    try:
        value = decode_text(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        return {}, f'"chat_template_kwargs" cannot be read as JSON: {shown(value)}: correct it'
    value = {} if is_nothing(value) else value
    if not isinstance(value, dict):
        return {}, f'expected "chat_template_kwargs" to be an object, found {shown(value)}'
    value = {key: _flag(row[key]) for key in TEMPLATE_VARIABLES if not is_empty(row.get(key))} | {
        key: given for key, given in value.items() if given is not None
    }
    if taken := ", ".join(sorted(value.keys() & NOT_VARIABLES)):
        return {}, f'"chat_template_kwargs" has {taken}, no variable of chat templates: leave it out'
    if not isinstance(thinks := value.get("enable_thinking", True), bool):
        return {}, f'expected "enable_thinking" to be true or false, found {shown(thinks)}'
    return value, None


def _present(turn: Mapping[str, Any], keys: Any) -> list[str]:
    return [key for key in turn if key in keys and turn[key] is not None]
