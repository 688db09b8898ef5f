"""The proof that runs on every row: what is learned reads exactly as the model's turns, each with its end.

It takes nothing on trust from the code that laid the tokens out: learned positions are counted, each run of them is
decoded again and compared with the turn's text, and the token that ends the turn must be there.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence

from finetune.chat_templates.example import IGNORE_INDEX, ChatFormat, SupervisedSpan, TokenizedConversation

SHOWN = 24


def check_labels(chat_format: ChatFormat, layouts: Sequence[TokenizedConversation]) -> list[str | None]:
    """For each layout None, or what is wrong with its labels."""
    texts = chat_format.plain.decode_all(
        [
            layout.labels[answer.start : answer.stop - answer.ended]
            if IGNORE_INDEX not in layout.labels[answer.start : answer.stop]
            else []
            for layout in layouts
            for answer in layout.answers
        ]
    )
    reading = iter(texts)
    control_ids = chat_format.plain.control_ids
    return [_fault(layout, [next(reading) for _ in layout.answers], control_ids) for layout in layouts]


def _fault(layout: TokenizedConversation, texts: Sequence[str], control_ids: Collection[int]) -> str | None:
    labels = layout.labels
    learned = len(labels) - labels.count(IGNORE_INDEX)
    if not learned:
        return "nothing in it would be learned"
    claimed = sum(answer.stop - answer.start for answer in layout.answers)
    if labels[0] != IGNORE_INDEX:
        return "it begins with what would be learned, and nothing predicts a first token"
    if learned != claimed:
        return f"{learned:,} positions would be learned where its model turns have {claimed:,}"
    for answer, text in zip(layout.answers, texts, strict=True):
        if answer.ended and labels[answer.stop - 1] not in control_ids:
            return f"turn {answer.turn} would not learn to stop"
        if not _says_the_same(text, answer):
            return _difference(text, answer)
    return None


def _says_the_same(text: str, answer: SupervisedSpan) -> bool:
    """White space at the ends aside: templates add or strip it there. A cut turn says the beginning."""
    if not answer.ended:
        text = text.rstrip("\ufffd")  # the cut may go through a character
    if text == answer.text:
        return True
    said, learned = answer.text.strip(), text.strip()
    if answer.ended:
        return said == learned or _normal(said) == _normal(learned)
    return said.startswith(learned) or _normal(said).startswith(_normal(learned))


def _normal(text: str) -> str:
    """For tokenizers that normalize: width and composition variants of a character are the same."""
    return unicodedata.normalize("NFKC", text)


def _difference(text: str, answer: SupervisedSpan) -> str:
    said, learned = answer.text.strip(), text.strip()
    same = next(
        (place for place, (one, other) in enumerate(zip(said, learned, strict=False)) if one != other),
        min(len(said), len(learned)),
    )
    return (
        f"turn {answer.turn}, character {same}: the tokenizer loses what the turn says: "
        f"{said[same : same + SHOWN]!r} would be learned as {learned[same : same + SHOWN]!r}"
    )
