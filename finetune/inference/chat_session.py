"""The conversation of a chat, and how it is saved as a training row. No model and no screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.conversation import Turn, to_row
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError

ROLES = {"human", "model", "system"}


@dataclass
class ChatSession:
    """Questions with their answers, and an optional system turn."""

    system: str | None = None
    pairs: list[tuple[str, str]] = field(default_factory=list)  # (question, answer)

    def turns(self, question: str | None = None) -> list[Turn]:
        """Return the conversation, with `question` as its last turn if one is given."""
        turns = [Turn("system", self.system)] if self.system else []
        for asked, answer in self.pairs:
            turns += [Turn("human", asked), Turn("model", answer)]
        return turns if question is None else [*turns, Turn("human", question)]

    def add(self, question: str, answer: str) -> None:
        """Append a question and its answer."""
        self.pairs.append((question, answer))

    def undo(self) -> str | None:
        """Remove the last question and its answer; return the question, or None if there is none."""
        return self.pairs.pop()[0] if self.pairs else None

    def reset(self) -> None:
        """Remove all questions and answers; the system turn stays."""
        self.pairs.clear()


def save_conversation(path: Path, turns: Sequence[Turn]) -> int:
    """Append the conversation to a file of training rows; return the number of rows in the file.

    A new file is a JSON array, or JSON lines if its name ends in .jsonl. Existing rows are not changed.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: nothing was saved: not a readable JSON file: {error}") from None
    rows = _parse_rows(path, text)
    row = to_row(turns, _next_id(rows))
    if any(existing["conversations"] == row["conversations"] for existing in rows):
        raise ConfigError(f"{path}: holds this conversation already")
    line = json.dumps(row, ensure_ascii=False)
    is_json_lines = path.suffix == ".jsonl" if not rows else not text.lstrip().startswith("[")
    if is_json_lines:
        text = "".join([text.rstrip("\n"), "\n" if rows else "", line, "\n"])
    elif rows:
        text = f"{text.rstrip().removesuffix(']').rstrip()},\n{line}\n]\n"
    else:
        text = f"[\n{line}\n]\n"
    write_text_atomically(path, text)
    return len(rows) + 1


def _parse_rows(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError:
        rows = None
    if rows is None or not all(map(_is_training_row, rows)):
        raise ConfigError(
            f"{path}: nothing was saved: expected rows like "
            '{"conversations": [{"from": "human", "value": "..."}, ...]}: name another file'
        )
    return rows


def _is_training_row(row: Any) -> bool:
    turns = row.get("conversations") if isinstance(row, dict) else None
    return isinstance(turns, list) and all(isinstance(turn, dict) and turn.get("from") in ROLES for turn in turns)


def _next_id(rows: Sequence[dict[str, Any]]) -> int | None:
    """Return the largest id plus one; None unless all rows have integer ids."""
    ids = [row["id"] for row in rows if type(row.get("id")) is int]
    return max(ids, default=-1) + 1 if len(ids) == len(rows) else None
