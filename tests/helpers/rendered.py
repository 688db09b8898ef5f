"""One conversation rendered, and what of it is learned."""

from finetune.chat_templates import IGNORE_INDEX, Renderer
from finetune.conversation import Conversation, Turn


def conversation(*turns: tuple[str, str], row: int = 0) -> Conversation:
    return Conversation(tuple(Turn(role, text) for role, text in turns), row, "rows.json", row)


def render(chat_format, *turns, max_length=10_000):
    return Renderer(chat_format, max_length).render(conversation(*turns))


def learned(example):
    return [label for label in example.labels if label != IGNORE_INDEX]


def said(tokenizer, example):
    """What each learned run of an example reads, its end token aside."""
    runs, run = [], []
    for label in [*example.labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs
