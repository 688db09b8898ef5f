"""The words of the page, in the language of the browser, and what is said as Markdown that shows it exactly."""

from __future__ import annotations

import re

ENGLISH = {
    "tuned": "Tuned",
    "base": "Base, as it was before the training",
    "message": "Your message; Shift+Enter for a new line",
    "send": "Send",
    "stop": "Stop",
    "retry": "Retry",
    "undo": "Undo",
    "reset": "New conversation",
    "compare": "Compare with the base",
    "compare_info": "Both answer the same conversation; the tuned answers are kept in it",
    "settings": "Settings",
    "system": "System turn",
    "max_new_tokens": "Most tokens of an answer",
    "temperature": "Temperature",
    "temperature_info": "0: greedy, the likeliest token each time",
    "top_p": "Top p",
    "seed": "Seed",
    "seed_info": "Makes drawn answers repeatable; empty: another one each time",
}
CHINESE = {
    "tuned": "微调后",
    "base": "基座模型（微调前）",
    "message": "输入消息，Shift+Enter 换行",
    "send": "发送",
    "stop": "停止",
    "retry": "重新回答",
    "undo": "撤销",
    "reset": "新对话",
    "compare": "与基座模型对比",
    "compare_info": "两个模型回答同一段对话，保留微调后模型的回答",
    "settings": "设置",
    "system": "系统提示",
    "max_new_tokens": "回答的最大 token 数",
    "temperature": "温度",
    "temperature_info": "0 为贪心解码，每次取最可能的 token",
    "top_p": "Top p",
    "seed": "随机种子",
    "seed_info": "固定后采样结果可复现；留空则每次不同",
}
FENCE = re.compile(r"\s{0,3}(```+|~~~+)")
CODE = re.compile(r"(`+)(?:(?!\1).)+?\1")


def as_markdown(text: str) -> str:
    """Text whose Markdown may act, and nothing else: no HTML of it, and no picture that would be fetched."""
    lines, fence = [], None
    for line in text.split("\n"):
        opens = FENCE.match(line)
        if fence is None:
            lines.append(line if opens else _escaped(line))
            fence = opens.group(1) if opens else None
        else:
            lines.append(line)
            if opens and opens.group(1).startswith(fence):
                fence = None
    return "\n".join(lines)


def _escaped(line: str) -> str:
    """Outside code spans, in which Markdown escapes by itself."""
    parts, at = [], 0
    for code in CODE.finditer(line):
        parts += [_inert(line[at : code.start()]), code.group()]
        at = code.end()
    return "".join([*parts, _inert(line[at:])])


def _inert(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("![", "!&#91;")
