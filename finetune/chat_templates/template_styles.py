"""Find the style of messages that a chat template expects, by rendering samples."""

from collections.abc import Callable
from itertools import product

from finetune.chat_templates.example import UnrenderableError
from finetune.chat_templates.messages import REASONING_KEYS, MessageStyle, sample_tool, with_reasoning_inside
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
    best = 0
    for short_ids, content, as_json in product((False, True), ("", None), (False, True)):  # the most frequent first
        style = MessageStyle(as_json, content, short_ids)
        text = render(sample, style)
        if text is None:
            continue
        is_json = "'" + _KEY not in text and '\\"' + _KEY not in text
        written = ("aboutq1x" in text, text.count(_VALUE) == 1 and is_json, _RESULT in text and _TEXT in text)
        if all(written):
            return style
        best = max(best, written.index(False) + 1)
    what = {1: "declarations of tools", 2: "tool calls", 3: "results of tools"}.get(best, "tools")
    raise UnrenderableError(f"this chat template does not write {what}: {WITH_TOOLS}")


def reasoning_key(render: Render, *, inside: bool) -> str | None:
    """The key under which the template writes reasoning that the data has inside a text, or beside it; None: inside."""
    turn = Turn("model", with_reasoning_inside(_REASON, _TEXT)) if inside else Turn("model", _TEXT, reasoning=_REASON)
    sample = Conversation((Turn("human", "hi"), turn))
    found: dict[str | None, str] = {}
    for key in (*REASONING_KEYS, None):
        text = render(sample, MessageStyle(inside_key=key) if inside else MessageStyle(beside_key=key))
        if text is not None and _REASON in text and text.count(_TEXT) == 1:
            found[key] = text
    key = next(iter(found), None)
    return None if inside and found.get(None) == found.get(key) else key
