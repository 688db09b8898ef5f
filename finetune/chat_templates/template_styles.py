"""Find the style of messages that a chat template expects, by rendering samples."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import get_args

from finetune.chat_templates.example import UnrenderableError
from finetune.chat_templates.messages import (
    PARTS,
    REASONING_BEGIN,
    REASONING_END,
    REASONING_KEYS,
    CallIds,
    MessageStyle,
    sample_tool,
    with_reasoning_inside,
)
from finetune.conversation import Conversation, ToolCall, Turn

Render = Callable[[Conversation, MessageStyle], str | None]  # None: the template refuses the sample
WITH_TOOLS = "--chat_template hermes has it, as have those of Qwen, Llama 3.1 and later, Mistral, DeepSeek, GLM"
_NAME, _KEY, _VALUE, _RESULT, _TEXT, _REASON = "nameq1x", "keyq1x", "valueq1x", "resultq1x", "textq1x", "reasonq1x"


def tool_style(render: Render) -> MessageStyle:
    """The first style in which the template writes all of a sample with tools.

    Raises:
        UnrenderableError: the template has no tools, or no style of them that is known.
    """
    call = ToolCall(_NAME, {_KEY: _VALUE}, "id-1")
    turns = (
        Turn("human", "hi"), Turn("model", "", tool_calls=(call,)),
        Turn("tool", _RESULT, tool_call_id="id-1"), Turn("model", _TEXT),
    )  # fmt: skip
    sample = Conversation(turns, tools=(sample_tool(_NAME, _KEY, "aboutq1x"),))
    unnamed = (turns[0], replace(turns[1], tool_calls=(replace(call, id=None),)), Turn("tool", _RESULT), turns[3])
    without_ids = replace(sample, turns=unnamed)
    best = 0
    for ids, content, as_json in product(get_args(CallIds), ("", None), (False, True)):  # the most frequent first
        style = MessageStyle(as_json, content, ids)
        text = render(sample, style)
        if text is None or (ids == "given" and render(without_ids, style) is None):
            continue
        asked, called = (render(replace(sample, turns=turns[:count]), style) or "" for count in (1, 2))
        has_name = not called or called.count(_NAME) > asked.count(_NAME)
        is_quoted = any(text.count(quote + _KEY) > asked.count(quote + _KEY) for quote in ("'", '\\"'))
        is_call = has_name and text.count(_VALUE) == 1 and not is_quoted
        written = ("aboutq1x" in text, is_call, _RESULT in text and _TEXT in text)
        if all(written):
            return style
        best = max(best, written.index(False) + 1)
    what = {1: "declarations of tools", 2: "tool calls", 3: "results of tools"}.get(best, "tools")
    raise UnrenderableError(f"this chat template does not write {what}: {WITH_TOOLS}")


def takes_only_parts(render: Render) -> bool:
    """Whether the template writes texts only if contents are lists of parts."""
    sample = Conversation((Turn("human", "hi"), Turn("model", _TEXT)))
    text, parts = (render(sample, MessageStyle(texts_as_parts=as_parts)) or "" for as_parts in (False, True))
    return _TEXT not in text and _TEXT in parts and f"'{_TEXT}" not in parts and f'"{_TEXT}' not in parts


def reasoning_key(render: Render, *, inside: bool) -> str | None:
    """The key under which the template writes reasoning that the data has inside a text, or beside it; None: inside.

    Reasoning inside the text of a template that closes reasoning of its own in front of it would be a second one.
    """
    turn = Turn("model", with_reasoning_inside(_REASON, _TEXT)) if inside else Turn("model", _TEXT, reasoning=_REASON)
    sample = Conversation((Turn("human", "hi"), turn))
    found: dict[str | None, str] = {}
    for key in (*REASONING_KEYS, PARTS, None):
        text = render(sample, MessageStyle(inside_key=key) if inside else MessageStyle(beside_key=key)) or ""
        is_quoted = f"'{_REASON}" in text or f'"{_REASON}' in text  # the list of parts itself
        if _REASON in text and text.count(_TEXT) == 1 and not is_quoted:
            found[key] = text
    in_front = found.get(None, "").partition(_REASON)[0].rstrip().removesuffix(REASONING_BEGIN).rstrip()
    if in_front.endswith(REASONING_END):
        del found[None]
    key = next(iter(found), REASONING_KEYS[0] if in_front.endswith(REASONING_END) else None)
    return None if inside and None in found and found[None] == found[key] else key
