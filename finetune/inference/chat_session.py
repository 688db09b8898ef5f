"""The conversation of a chat, and how it is saved as a training row. No model and no screen."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.conversation import ToolCall, Turn, to_row
from finetune.inference.answer_turns import call_text
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError

TOOL_COMMAND = "/tool "


@dataclass
class ChatSession:
    """Messages with their answers, an optional system turn, and declarations of tools as a `Conversation` has them."""

    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    pairs: list[tuple[tuple[Turn, ...], Turn]] = field(default_factory=list)  # a question, or results; and the answer
    results: list[Turn] = field(default_factory=list)  # of some calls of the last answer, while others have none

    def turns(self, asked: Sequence[Turn] = ()) -> list[Turn]:
        """Return the conversation, with `asked` as its last turns."""
        turns = [Turn("system", self.system)] if self.system else []
        for before, answer in self.pairs:
            turns += [*before, answer]
        return [*turns, *asked]

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """The calls of the last answer that have no result yet."""
        return self.pairs[-1][1].tool_calls[len(self.results) :] if self.pairs else ()

    def asked(self, message: str) -> tuple[Turn, ...]:
        """The turns that a typed message asks to answer: a question, or the results of all calls (`/tool RESULT`).

        A result is kept, and nothing is asked, while other calls have none.
        """
        calls = self.open_calls
        if not message.startswith(TOOL_COMMAND):
            if calls:
                raise ConfigError(f"{call_text(calls[0])} has no result: give it with /tool RESULT, or use /undo")
            return (Turn("human", message),)
        text = message.removeprefix(TOOL_COMMAND).strip()
        if not calls or not text:
            raise ConfigError("/tool RESULT: " + ("has no text" if calls else "the model has called no tool"))
        result = Turn("tool", text, tool_call_id=calls[0].id, tool_name=calls[0].name)
        if len(calls) > 1:
            self.results.append(result)
            return ()
        return (*self.results, result)

    def add(self, asked: Sequence[Turn], answer: Turn) -> None:
        """Append what was asked and its answer."""
        self.pairs.append((tuple(asked), answer))
        self.results.clear()

    def undo(self) -> str | None:
        """Remove the last message and its answer; return the message as it was typed, or None if there is none."""
        if not self.results:
            if not self.pairs:
                return None
            self.results = [*self.pairs.pop()[0]]
        turn = self.results.pop()
        return turn.text if turn.role == "human" else TOOL_COMMAND + turn.text

    def reset(self) -> None:
        """Remove all messages and answers; the system turn stays."""
        self.pairs.clear()
        self.results.clear()


def save_conversation(path: Path, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> int:
    """Append the conversation to a file of JSON lines, as a training row; return the number of rows in the file.

    Raises:
        ConfigError: the file cannot be read, holds something else than such rows, or this conversation already.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: nothing was saved: not a readable file: {error}") from None
    rows = [line for line in text.split("\n") if line.strip()]
    if not all(line.startswith("{") and '"conversations": [' in line for line in rows):
        raise ConfigError(
            f'{path}: nothing was saved: expected a row like {{"conversations": [{{"from": "human", "value": "..."}}, '
            "...]} on each line: name another file"
        )
    row = json.dumps(to_row(turns, tools=tools), ensure_ascii=False)
    if row in rows:
        raise ConfigError(f"{path}: holds this conversation already")
    write_text_atomically(path, "".join(f"{line}\n" for line in (*rows, row)))
    return len(rows) + 1
