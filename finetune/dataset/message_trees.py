"""Trees of messages, as Open Assistant publishes them: each path from the root to a last answer is a row."""

from collections.abc import Callable, Iterator
from typing import Any

from finetune.dataset.json_reader import RawRow
from finetune.dataset.turn_reading import role_of


def _root(row: Any) -> dict[str, Any] | None:
    """The first message of a tree, which has `replies`: the row, or what it has under `prompt`; None: no tree."""
    root = row.get("prompt", row) if type(row) is dict else None
    return root if type(root) is dict and isinstance(root.get("replies"), list) else None


def rows_of_trees(raws: Iterator[RawRow], has_faults: Callable[[RawRow], bool]) -> Iterator[RawRow]:
    """The rows with the paths in place of trees, numbered anew.

    Each answer is supervised once: in its first path without faults, so that leaving out bad rows does not lose it.
    """
    added = 0
    for raw in raws:
        if raw.row is None or (root := _root(raw.value)) is None:
            yield raw._replace(row=raw.row + added) if added and raw.row is not None else raw
            continue
        own_id = raw.value.get("message_tree_id")
        seen: set[int] = set()
        for number, path in enumerate(_paths(root)):
            turns: list[Any] = []
            for message in path:
                turn = {key: value for key, value in message.items() if key != "replies"}
                if id(message) in seen and role_of(message.get("role")) == "model":
                    turn["train"] = False
                turns.append(turn)
            row_id = {"id": f"{own_id}/{number}"} if isinstance(own_id, str) else {}
            of_tree = {} if root is raw.value else raw.value
            beside = {key: value for key, value in of_tree.items() if key not in ("prompt", "message_tree_id")}
            added += number > 0
            row = RawRow(raw.row + added, beside | row_id | {"messages": turns}, raw.faults if number == 0 else [])
            if not has_faults(row):
                seen.update(map(id, path))
            yield row


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
