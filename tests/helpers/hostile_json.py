"""JSON values as an attacker, or a damaged disk, would change them: seeded."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

VALUES = (
    None, True, 0, -1, 10**400, 2**63, 1.5, float("nan"), float("inf"), 1e308, "", "\ud800", "1e999", "../x", [], {},
    [None], [[]], {"a": None}, ["\udfff"], {"<img src=x>\u2028": "</script>"}, [[[[]]]] * 9,
)  # fmt: skip


def mutated(value: Any, random: Random) -> Any:
    """The value with one of its parts replaced, removed or put under another key."""
    value = json.loads(json.dumps(value))
    holder, key = random.choice(list(_places(value)))
    other = json.loads(json.dumps(random.choice(VALUES)))
    if random.random() < 0.2:
        del holder[key]
    elif isinstance(holder, dict) and random.random() < 0.2:
        holder[json.dumps(other)] = holder.pop(key)
    else:
        holder[key] = other
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield value, key
        yield from _places(part)
