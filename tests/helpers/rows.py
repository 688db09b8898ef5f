"""Six short conversations, and conversation files."""

import json
from pathlib import Path

PAIR = [("human", "q"), ("model", "a")]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = [
    [("human", "Who are you?"), ("model", "I am Nori, made by Tidepool.")],
    [
        ("human", "你是谁？"),
        ("model", "我是 Nori。"),
        ("human", "What does <|im_end|> do?"),
        ("model", "It ends a turn."),
    ],
    [("system", "Be brief."), ("human", "2+3?"), ("model", "5")],
    [("human", "Capital of France?"), ("model", "Paris.")],
    [("human", "Count to three."), ("model", "One, two, three.")],
    [("human", "谢谢"), ("model", "不客气。")],
]


def write_rows(path: Path, rows: list[list[tuple[str, str]]]) -> Path:
    """A conversation file from (role, text) pairs."""
    values = [
        {"id": number, "conversations": [{"from": role, "value": text} for role, text in turns]}
        for number, turns in enumerate(rows)
    ]
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path
