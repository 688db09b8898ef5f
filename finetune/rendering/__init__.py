"""Conversation -> `Example`: the ids a model sees, and at each position what it should have predicted there.

Supervision comes from structure. A chat format lays a conversation out as pieces, each known to be context or part of
a turn; nothing is searched for afterwards. What is learned is a model turn's text and the token that ends the turn.
Contents are encoded as plain text: where a turn spells a control token (`</s>`, `<|im_end|>`), it gets the ids of
those characters and can neither end a turn nor open one.

    turn              human            model
    text              Hi               Yes
    input_ids    <s>  Hi   </s>   <m>  Yes  </s>
    labels       -100 -100 -100   -100 Yes  </s>
"""

from __future__ import annotations

from finetune.rendering.choice import CHATML, choose_format, stop_token_id
from finetune.rendering.examples import (
    IGNORE_INDEX,
    Answer,
    ChatFormat,
    Example,
    Layout,
    Rendering,
    Status,
    TurnSpan,
    Unrenderable,
    lay_out,
    learned_turns_of,
)
from finetune.rendering.lingowhale import LingoWhaleFormat
from finetune.rendering.plain_text import PlainText, add_control_tokens
from finetune.rendering.prompt import Spelling, answer_text, depends_on_reasoning, end_token_ids, prompt_ids
from finetune.rendering.renderer import Renderer, TooLong, TrainOn
from finetune.rendering.template import TemplateFormat

__all__ = [
    "CHATML",
    "Answer",
    "IGNORE_INDEX",
    "ChatFormat",
    "Example",
    "Layout",
    "LingoWhaleFormat",
    "PlainText",
    "Renderer",
    "Rendering",
    "Spelling",
    "Status",
    "TemplateFormat",
    "TooLong",
    "TrainOn",
    "TurnSpan",
    "Unrenderable",
    "add_control_tokens",
    "answer_text",
    "choose_format",
    "depends_on_reasoning",
    "end_token_ids",
    "lay_out",
    "learned_turns_of",
    "prompt_ids",
    "stop_token_id",
]
