"""Rows of conversations, the files they lie in, and what reading these says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.conversation import BadRow, Conversation
from finetune.dataset.conversation_reader import ConversationReader, read_conversations
from finetune.dataset.data_sources import find_sources
from finetune.utils.errors import DataError

HELLO = [{"from": "human", "value": "Hello"}, {"from": "model", "value": "Hi!"}]

LOST = chr(0xD83D)  # half of an emoji


def turns(*pairs: tuple[Any, Any]) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def good_row(number: int) -> dict:
    """A good row, different for each number."""
    return {"id": number, **turns(("human", f"question {number}"), ("model", f"answer {number}"))}


def written(path: Path, content: Any) -> Path:
    """Bytes and text as they are, anything else as JSON."""
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Any, **options: Any) -> str:
    with pytest.raises(DataError) as raised:
        read_conversations(path, **options)
    return str(raised.value)


def read(*paths: Any, repairs: Sequence[str] = ()) -> list[Conversation | BadRow]:
    return list(ConversationReader(find_sources([str(path) for path in paths]), repairs=repairs))


def faults(*paths: Any, repairs: Sequence[str] = ()) -> list[str]:
    """Every fault, in order."""
    return [fault for one in read(*paths, repairs=repairs) if isinstance(one, BadRow) for fault in one.faults]


def spoken(one: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in one.turns]
