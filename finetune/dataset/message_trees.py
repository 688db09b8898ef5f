"""Trees of messages, as Open Assistant publishes them: each path from the root to a last answer is a row."""

from collections.abc import Iterator
from typing import Any

from finetune.dataset.json_reader import RawRow
from finetune.dataset.turn_reading import role_of


def is_tree(row: Any) -> bool:
    """Whether a row holds a tree: a first message with `replies`, by itself or under `prompt`."""
    if type(row) is not dict or ("prompt" not in row and "replies" not in row):
        return False
    root = row.get("prompt", row)
    return type(root) is dict and isinstance(root.get("replies"), list)


def rows_of_trees(raws: Iterator[RawRow]) -> Iterator[RawRow]:
    """The rows with the paths in place of trees, numbered anew; each answer is supervised in its first path alone."""
    added = 0
    for raw in raws:
        if raw.row is None or not is_tree(raw.value):
            yield raw._replace(row=raw.row + added) if added and raw.row is not None else raw
            continue
        own_id = raw.value.get("message_tree_id")
        seen: set[int] = set()
        for number, path in enumerate(_paths(raw.value.get("prompt", raw.value))):
            turns: list[Any] = []
            for message in path:
                turn = {key: value for key, value in message.items() if key != "replies"}
                if id(message) in seen and role_of(message.get("role")) == "model":
                    turn["train"] = False
                seen.add(id(message))
                turns.append(turn)
            row_id = {"id": f"{own_id}/{number}"} if isinstance(own_id, str) else {}
            added += number > 0
            yield RawRow(raw.row + added, row_id | {"messages": turns}, raw.faults if number == 0 else [])


def _paths(root: dict[str, Any]) -> Iterator[list[Any]]:
    """Paths to the leaves, each up to its last answer, without those of which an earlier path holds every answer."""
    stack: list[list[Any]] = [[root]]
    found: set[int] = set()
    while stack:
        path = stack.pop()
        replies = path[-1].get("replies")
        messages = [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []
        stack += [[*path, reply] for reply in reversed(messages)]
        if messages:
            continue
        answers = [index for index, message in enumerate(path) if role_of(message.get("role")) == "model"]
        path = path[: answers[-1] + 1] if answers else path
        if id(path[-1]) not in found:
            found.update(map(id, path))
            yield path
