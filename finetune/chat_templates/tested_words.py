"""Words of human and system turns that a chat template looks for: `/no_think` of SmolLM3 and Nemotron."""

import re
from dataclasses import replace

from finetune.conversation import Conversation, Turn

_TESTED = re.compile(r"""(['"])(\S+?)\1\s+(?:not\s+)?in\b|(?:starts|ends)with\(\s*(['"])(\S+?)\3""")


def tested_words(template: str) -> re.Pattern[str] | None:
    """What matches the words that the template looks for in texts (`"/no_think" in message.content`); None without any.

    Names are keys of messages (`"tools" in message`), and no words of texts.
    """
    words = {one or other for _, one, _, other in _TESTED.findall(template) if not (one or other).isidentifier()}
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True)))) if words else None


def has_words(conversation: Conversation, words: re.Pattern[str] | None) -> bool:
    """Whether a human or system turn has one of these words."""
    return words is not None and any(
        turn.role in ("human", "system") and words.search(turn.text) for turn in conversation.turns
    )


def between_words(text: str, words: re.Pattern[str] | None, mark: str = "") -> tuple[str, str]:
    """The longest part of a text between these words, and the text with a mark in place of it.

    >>> between_words("Be brief. /no_think", re.compile("/no_think"), "...")
    ('Be brief.', '... /no_think')
    """
    parts = words.split(text) if words else [text]
    if len(parts) == 1:
        return text, mark
    longest = max(range(len(parts)), key=lambda index: len(parts[index].strip()))
    part = parts[longest].strip()
    parts[longest] = parts[longest].replace(part, mark) if part else parts[longest]
    found = words.findall(text) if words else []
    return part, "".join(part + word for part, word in zip(parts, [*found, ""], strict=True))


def without_words(conversation: Conversation, words: re.Pattern[str] | None) -> tuple[Turn, ...]:
    """The turns with the texts that `with_marks` has marks for."""
    if not has_words(conversation, words):
        return conversation.turns
    return tuple(
        replace(turn, text=between_words(turn.text, words)[0]) if turn.role in ("human", "system") else turn
        for turn in conversation.turns
    )
