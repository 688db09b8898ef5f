"""A conversation appended to a file of training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.conversation import Turn, to_row
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError

ROLES = {"human", "model", "system"}


def save_conversation(path: Path, turns: Sequence[Turn]) -> int:
    """Append the conversation as a row of the project's own layout; returns how many rows the file has now.

    A new file is a JSON array, or JSON lines where its name ends in .jsonl. Rows that are there stay as they are.

    Raises:
        ConfigError: the file holds something else than such rows, or this very conversation.
        StorageError: the disk refused.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not a JSON file that can be read, nothing was saved: {error}") from None
    rows = _rows(path, text)
    row = to_row(turns, _next_id(rows))
    if any(one["conversations"] == row["conversations"] for one in rows):
        raise ConfigError(f"{path}: holds this conversation already")
    line = json.dumps(row, ensure_ascii=False)
    has_lines = path.suffix == ".jsonl" if not rows else not text.lstrip().startswith("[")
    if has_lines:
        new = "".join([text.rstrip("\n"), "\n" if rows else "", line, "\n"])
    elif rows:
        new = f"{text.rstrip().removesuffix(']').rstrip()},\n{line}\n]\n"
    else:
        new = f"[\n{line}\n]\n"
    write_text_atomically(path, new)
    return len(rows) + 1


def _rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError:
        rows = None
    if rows is None or not all(map(_is_ours, rows)):
        raise ConfigError(
            f"{path}: nothing was saved: expected rows like "
            '{"conversations": [{"from": "human", "value": "..."}, ...]}, found something else: name another file'
        )
    return rows


def _is_ours(row: Any) -> bool:
    turns = row.get("conversations") if isinstance(row, dict) else None
    return isinstance(turns, list) and all(isinstance(turn, dict) and turn.get("from") in ROLES for turn in turns)


def _next_id(rows: Sequence[dict[str, Any]]) -> int | None:
    """One more than the largest, where all rows have numbers; two rows must not have the same."""
    ids = [row["id"] for row in rows if type(row.get("id")) is int]
    return max(ids, default=-1) + 1 if len(ids) == len(rows) else None
