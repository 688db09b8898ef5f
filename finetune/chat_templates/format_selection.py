"""Select the chat format of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat_templates.example import ChatFormat, tokenize_conversation
from finetune.chat_templates.jinja_format import JinjaFormat
from finetune.chat_templates.lingowhale_format import LingoWhaleFormat
from finetune.chat_templates.plain_text import add_control_tokens
from finetune.conversation import Turn
from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")


def select_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    *,
    human_token_ids: Sequence[int],
    model_token_ids: Sequence[int],
    is_lingowhale: bool = False,
    content_tokens: Sequence[str] = (),
    day: date | None = None,
) -> tuple[ChatFormat, list[str]]:
    """Select the chat format of a run; also return notes about choices that the user did not make.

    Args:
        chat_template: `lingowhale`, `chatml` or a Jinja file; None: the tokenizer's own template, else LingoWhale's
            format for LingoWhale, else ChatML, whose markers are added to the tokenizer if it lacks them.
        content_tokens: added tokens that contents may use.
        day: for a template that writes today's date; default: today's in UTC.
    """
    notes = []
    if chat_template is None and tokenizer.chat_template is None:
        chat_template = "lingowhale" if is_lingowhale else "chatml"
        notes.append(f"the tokenizer has no chat template: conversations are rendered in the {chat_template} format")
    if chat_template == "lingowhale":
        return LingoWhaleFormat(tokenizer, human_token_ids, model_token_ids, content_tokens), notes
    if chat_template == "chatml":
        missing = [marker for marker in CHATML_MARKERS if marker not in tokenizer.get_vocab()]
        if missing:
            add_control_tokens(tokenizer, missing)
            notes.append(f"chatml: {' and '.join(missing)} are new to this tokenizer and are added to its vocabulary")
        tokenizer.chat_template = CHATML
    elif chat_template is not None:
        tokenizer.chat_template = _template_file(chat_template)
    # The result is saved with this tokenizer, so that serving renders as training did.
    name = chat_template or "the tokenizer's own chat template"
    chat_format = JinjaFormat(tokenizer, tokenizer.get_chat_template(), name, content_tokens, day)
    if chat_format.day is not None:
        notes.append(
            f"the chat template writes today's date into every conversation: {chat_format.day} (UTC), which a resumed "
            "run keeps"
        )
    return chat_format, notes


def _template_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat_template {name}: expected lingowhale, chatml or a Jinja file that can be read: {error}"
        ) from None


def stop_token_id(chat_format: ChatFormat) -> int:
    """The token that ends a model turn in this format, as it is supervised."""
    probe = tokenize_conversation(chat_format, [Turn("human", "a"), Turn("model", "b")])
    return probe.labels[probe.supervised_length - 1]
