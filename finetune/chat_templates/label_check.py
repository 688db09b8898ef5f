"""The label check of every row: supervised labels decode to the model turns, each with its end token.

It does not rely on the code that tokenized the row: supervised positions are counted, each span of them is decoded and
compared with the text of the turn, and the end-of-turn token must be there. Where the template writes more than the
text, the decoded labels must hold the reasoning, the text, and the name and all arguments of each tool call.
"""

import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from finetune.chat_templates.example import IGNORE_INDEX, ChatFormat, SupervisedSpan, TokenizedConversation
from finetune.chat_templates.messages import split_reasoning
from finetune.chat_templates.template_skeleton import OTHER_TEMPLATE
from finetune.conversation import Turn

SHOWN_CHARACTERS = 24
_PYTHON = {"true": "True", "false": "False", "null": "None"}  # as templates write values that they do not turn to JSON


def check_labels(chat_format: ChatFormat, conversations: Sequence[TokenizedConversation]) -> list[str | None]:
    """For each conversation, None or what is wrong with its labels."""
    ids = [_ids_of_text(tokenized, span) for tokenized in conversations for span in tokenized.supervised_spans]
    texts = iter(chat_format.plain.decode_all(ids))
    control_ids = chat_format.plain.control_ids
    return [
        _fault(tokenized, [next(texts) for _ in tokenized.supervised_spans], control_ids) for tokenized in conversations
    ]


def _ids_of_text(tokenized: TokenizedConversation, span: SupervisedSpan) -> list[int]:
    """The labels of a span without its end token; none if they have a gap."""
    labels = tokenized.labels[span.start : span.stop]
    return [] if IGNORE_INDEX in labels else labels[: len(labels) - span.num_end]


def _fault(tokenized: TokenizedConversation, texts: Sequence[str], control_ids: Collection[int]) -> str | None:
    labels = tokenized.labels
    supervised = len(labels) - labels.count(IGNORE_INDEX)
    if not supervised:
        return "nothing in it would be supervised"
    expected = sum(span.stop - span.start for span in tokenized.supervised_spans)
    if labels[0] != IGNORE_INDEX:
        return "its first token would be supervised, and nothing predicts a first token"
    if supervised != expected:
        return f"{supervised:,} positions would be supervised where its model turns have {expected:,}"
    for span, text in zip(tokenized.supervised_spans, texts, strict=True):
        if span.ended and labels[span.stop - 1] not in control_ids:
            return f"turn {span.turn} would not learn to stop"
        if not _is_text_of(text, span):
            return _difference(text, span, spells=bool(tokenized.spelled))
        if span.ended and span.content is not None and (missing := _missing_part(text, span.content)) is not None:
            return (
                f"turn {span.turn}: {missing!r} would not be supervised, because the chat template leaves it out or "
                f"rewrites it: {OTHER_TEMPLATE}"
            )
    return None


def _is_text_of(text: str, span: SupervisedSpan) -> bool:
    """Whether a decoded text is that of the turn, or its beginning if the turn was truncated.

    White space at the ends is ignored: templates add or strip it there.
    """
    if not span.ended:
        text = text.rstrip("\ufffd")  # the truncation may split a character
    if text == span.text:
        return True
    decoded, expected = text.strip(), span.text.strip()
    # NFKC for tokenizers that normalize: width and composition variants of a character are equal.
    for form in (str, partial(unicodedata.normalize, "NFKC")):
        if form(expected) == form(decoded) if span.ended else form(expected).startswith(form(decoded)):
            return True
    return False


def _missing_part(decoded: str, turn: Turn) -> str | None:
    """A part of the model turn that its decoded labels do not hold; None if they hold all of it."""
    parts = [turn.reasoning, *(split_reasoning(turn.text) or [turn.text])]
    for call in turn.tool_calls:
        parts += [call.name, *_leaves(call.arguments)]
    return next((part for part in parts if not _holds(decoded, part)), None)


def _leaves(value: Any) -> Iterator[str]:
    """The keys and values of a JSON object, those of objects inside it included, as JSON writes them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value if isinstance(value, str) else json.dumps(value)


def _holds(decoded: str, part: str) -> bool:
    """Whether the text has the part: as it is, as JSON or Python write it, or normalized by the tokenizer."""
    if part.strip() in decoded:
        return True
    as_json = (json.dumps(part, ensure_ascii=False), json.dumps(part), repr(part))
    forms = (part.strip(), *(form[1:-1] for form in as_json), _PYTHON.get(part, part))
    normal = unicodedata.normalize("NFKC", decoded)
    return any(unicodedata.normalize("NFKC", form) in normal for form in forms)


def _difference(text: str, span: SupervisedSpan, *, spells: bool) -> str:
    decoded, expected = text.strip(), span.text.strip()
    position = next(
        (index for index, pair in enumerate(zip(expected, decoded, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(decoded)),
    )
    shown = slice(position, position + SHOWN_CHARACTERS)
    reason = "the tokenizer does not preserve the text of the turn"
    if spells and "".join(decoded.split()) == "".join(expected.split()):
        reason = (
            "the row spells a control token, so its texts are encoded in parts, and this tokenizer changes the white "
            "space between them: take the spelling out of the row"
        )
    trained = f"{expected[shown]!r} would be trained as {decoded[shown]!r}"
    return f"turn {span.turn}, character {position}: {reason}: {trained}"
