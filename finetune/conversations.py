"""Conversation files -> validated `Conversation` objects.

A file holds a JSON array, or one JSON object a line, of

    {"id": 0, "conversations": [{"from": "human", "value": "..."}, {"from": "model", "value": "..."}]}

A row may begin with a system turn; human and model turns alternate and the last one is the model's. Whether a row
may begin with a model turn depends on the chat format, so that is left to the renderer. Rows and turns are counted
from 0. All faults of a file are collected before any is reported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import DataError, listed

Role = Literal["human", "model", "system"]
ALIASES: dict[str, Role] = {"human": "human", "user": "human", "model": "model", "gpt": "model", "assistant": "model"}
ALIASES["system"] = "system"
NOT_SHIPPED = {"coig_10k.json": "COIG's 10,000 conversations are not part of this project"}


@dataclass(frozen=True)
class Turn:
    """What one side says; `text` is never empty."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """One row of a file: `row` counts from 0, `source` is the file, `id` is whatever the row calls itself."""

    turns: tuple[Turn, ...]
    row: int
    source: str
    id: Any = None


def load_conversations(path: str | Path) -> list[Conversation]:
    """Read and check one file.

    Raises:
        DataError: the file is missing, empty, not UTF-8 or not JSON; or every faulty row, the first 20 shown.
    """
    conversations, faults = [], []
    for row, value in enumerate(_rows(Path(path))):
        place = f"{path}, row {row}"
        if isinstance(value, _Unreadable):
            faults.append(f"{path}, line {value.line}, column {value.column}: not JSON: {value.reason}")
            continue
        conversation, found = _conversation(value, row, str(path), place)
        faults += found
        if conversation is not None:
            conversations.append(conversation)
    if faults:
        raise DataError(listed(faults, "fault"))
    if not conversations:
        raise DataError(f"{path}: holds no conversations")
    return conversations


@dataclass(frozen=True)
class _Unreadable:
    line: int
    column: int
    reason: str


def _rows(path: Path) -> Iterator[Any]:
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{path}: not a list of conversations: nested too deeply") from None
        except ValueError as error:  # an integer of more than 4,300 digits
            raise DataError(f"{path}: not a list of conversations: {error}") from None
        yield from rows
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == 1 and not line.rstrip().endswith("}"):
                raise DataError(
                    f"{path}, line 1, column {error.colno}: expected a JSON array of conversations, "
                    f"or one JSON object a line: {error.msg}"
                ) from None
            yield _Unreadable(number, error.colno, error.msg)
        except (RecursionError, ValueError) as error:
            yield _Unreadable(number, 1, str(error))


def _text(path: Path) -> str:
    if not os.path.isfile(path):
        raise DataError(f"{path}: {_why_missing(path)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}: convert it, for example with iconv") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty: expected a JSON array of conversations")
    return text


def _why_missing(path: Path) -> str:
    if os.path.isdir(path):
        return "is a folder: name a file in it"
    shipped = ", ".join(str(file) for file in shipped_files()) or "none in this installation"
    reason = NOT_SHIPPED.get(path.name, "there is no such file")
    return f"{reason}; conversations that come with it: {shipped}"


def shipped_files() -> list[Path]:
    """The conversation files of this project: beside the package in a clone, inside it once installed."""
    here = Path(__file__).resolve().parent
    folder = here / "data" if (here / "data").is_dir() else here.parent / "data"
    return [folder / name for name in ("identity.json", "conversations.json") if (folder / name).is_file()]


def _conversation(value: Any, row: int, source: str, place: str) -> tuple[Conversation | None, list[str]]:
    if not isinstance(value, dict):
        return None, [f'{place}: expected an object with "conversations", found {_shown(value)}']
    turns = value.get("conversations")
    if not isinstance(turns, list):
        found = f"found {_shown(turns)}" if "conversations" in value else f"found the keys {', '.join(value) or 'none'}"
        return None, [f'{place}: expected "conversations" to be a list of turns, {found}']
    read, faults = [], []
    for number, turn in enumerate(turns):
        one, found = _turn(turn, f"{place}, turn {number}")
        faults += found
        read.append(one)
    if not faults:
        faults = _order_faults([turn.role for turn in read], place)
    if faults:
        return None, faults
    return Conversation(tuple(read), row, source, value.get("id")), []


def _turn(value: Any, place: str) -> tuple[Turn | None, list[str]]:
    if not isinstance(value, dict):
        return None, [f'{place}: expected an object with "from" and "value", found {_shown(value)}']
    faults = []
    role = ALIASES.get(value["from"]) if isinstance(value.get("from"), str) else None
    if role is None:
        faults.append(
            f'{place}: expected "from" to be human, model or system, found {_shown(value.get("from"))} '
            "(accepted as human: user; as model: gpt, assistant)"
        )
    text = value.get("value")
    if not isinstance(text, str):
        faults.append(f'{place}: expected "value" to be a string, found {_shown(text)}')
    elif not text.strip():
        faults.append(f'{place}: "value" is empty: say something or leave the turn out')
    else:
        surrogate = next((index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if surrogate is not None:
            faults.append(f'{place}: "value" holds half a character (a lone surrogate) at position {surrogate}')
    return (None, faults) if faults else (Turn(role, text), [])


def _order_faults(roles: list[Role], place: str) -> list[str]:
    if "model" not in roles:
        return [f"{place}: has no model turn: there is nothing to learn from it"]
    faults = []
    if "system" in roles[1:]:
        faults.append(f"{place}, turn {roles.index('system', 1)}: a system turn can only be the first")
    for number, (before, role) in enumerate(zip(roles, roles[1:], strict=False), start=1):
        if before == role != "system":
            faults.append(f"{place}, turn {number}: a second {role} turn in a row: merge the two")
    if roles[-1] == "human":
        faults.append(f"{place}, turn {len(roles) - 1}: the last turn is human, nobody answers it: leave it out")
    return faults


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
