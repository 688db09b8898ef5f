"""Conversation -> `Example`: input ids and labels.

Supervision comes from structure: a chat format tokenizes a conversation as pieces, each known to be context or part of
a turn; no separators are searched for afterwards. The text of a model turn and its end-of-turn token are supervised.
Contents are encoded as plain text: a control token that a turn spells (`</s>`, `<|im_end|>`) gets the ids of its
characters and can neither end a turn nor open one.

    turn              human            model
    text              Hi               Yes
    input_ids    <s>  Hi   </s>   <m>  Yes  </s>
    labels       -100 -100 -100   -100 Yes  </s>
"""

from finetune.chat_templates.example import (
    IGNORE_INDEX,
    ChatFormat,
    Example,
    RenderedConversation,
    TurnSpan,
    UnrenderableError,
    supervised_turns_of,
    tokenize_conversation,
)
from finetune.chat_templates.format_selection import CHATML, select_chat_format
from finetune.chat_templates.generation_prompt import (
    AnswerDecoder,
    answer_ids,
    answer_text,
    decode_after,
    end_token_ids,
    prompt_ids,
)
from finetune.chat_templates.jinja_format import JinjaFormat
from finetune.chat_templates.lingowhale_format import LingoWhaleFormat
from finetune.chat_templates.plain_text import PlainTextTokenizer, add_control_tokens
from finetune.chat_templates.renderer import Renderer
