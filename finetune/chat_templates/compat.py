"""Work around internals of transformers; each with the version it was written for.

`tests/unit/chat_templates/test_compat.py` fails when a workaround is no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[str]] | None:
    """What `apply_chat_template(..., tokenize=False)` renders for chats of plain JSON, without copying them first.

    `apply_chat_template` copies messages, tools and variables for each call, which for declarations of tools takes as
    long as rendering them. None if this tokenizer or this transformers renders in another way. (transformers 5.23)
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    try:
        from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template
    except ImportError:
        return None

    def render(chats: Sequence[list[dict[str, Any]]], template: str, tools: Any = None, **options: Any) -> list[str]:
        compiled = _compile_jinja_template(template)
        compiled.globals = dict(compiled.globals)  # each rendering copies them, from a ChainMap in thrice the time
        variables = {**tokenizer.special_tokens_map, **options}
        variables.setdefault("add_generation_prompt", False)
        variables.setdefault("documents", None)
        given = ([{key: value for key, value in turn.items() if value is not None} for turn in chat] for chat in chats)
        return [compiled.render(messages=_alias_reasoning_fields(chat), tools=tools, **variables) for chat in given]

    return render
