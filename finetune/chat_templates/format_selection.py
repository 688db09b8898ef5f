"""Select the chat format of a run."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser

from finetune.chat_templates.example import ChatFormat
from finetune.chat_templates.jinja_format import JinjaFormat
from finetune.chat_templates.lingowhale_format import LingoWhaleFormat
from finetune.chat_templates.plain_text import add_control_tokens
from finetune.conversation import DEFAULT_SETTINGS, ChatSettings
from finetune.utils.errors import ConfigError
from finetune.utils.user_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
# ChatML with tool calls as JSON between tags, the syntax that the Hermes models introduced.
HERMES = Path(__file__).with_name("hermes.jinja").read_text(encoding="utf-8")
NAMED = {"chatml": CHATML, "hermes": HERMES}


def select_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    settings: ChatSettings = DEFAULT_SETTINGS,
    *,
    is_lingowhale: bool = False,
    day: date | None = None,
) -> tuple[ChatFormat, list[str]]:
    """Select the chat format of a run; also return notes about choices that the user did not make.

    Args:
        chat_template: `lingowhale`, `chatml`, `hermes` (ChatML with tools) or a Jinja file; None: the tokenizer's own
            template, else LingoWhale's format for LingoWhale, else ChatML. The tokenizer gets markers that it lacks.
        day: for a template that writes today's date; default: today's in UTC.
    """
    notes = []
    if chat_template is None and tokenizer.chat_template is None:
        chat_template = "lingowhale" if is_lingowhale else "chatml"
        notes.append(f"the tokenizer has no chat template: conversations are rendered in the {chat_template} format")
    if chat_template == "lingowhale":
        if settings.template_kwargs or settings.reasoning == "context":
            raise ConfigError(
                "--chat_template lingowhale: --chat_template_kwargs and --reasoning context need a Jinja template"
            )
        markers = settings.human_token_ids, settings.model_token_ids
        return LingoWhaleFormat(tokenizer, *markers, settings.content_tokens), notes
    if chat_template in NAMED:
        missing = [marker for marker in CHATML_MARKERS if marker not in tokenizer.get_vocab()]
        if missing:
            add_control_tokens(tokenizer, missing)
            notes.append(
                f"{chat_template}: {' and '.join(missing)} are new to this tokenizer and are added to its vocabulary"
            )
        tokenizer.chat_template = NAMED[chat_template]
    elif chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    own: Any = tokenizer.chat_template  # Hermes 3 and Command R have several by name
    if isinstance(own, dict) and "default" not in own:
        raise ConfigError(
            f"the tokenizer has no default chat template, only {', '.join(own)}: give one as a --chat_template file"
        )
    # The result is saved with this tokenizer, so that serving renders as training did.
    name = chat_template or "the tokenizer's own chat template"
    tool_template = own.get("tool_use") if isinstance(own, dict) else None
    chat_format = JinjaFormat(tokenizer, tokenizer.get_chat_template(), name, settings, day, tool_template)
    if chat_format.day is not None:
        notes.append(
            f"the chat template writes today's date into every conversation: {chat_format.day} (UTC), which a resumed "
            "run keeps"
        )
    return chat_format, notes


def read_template(name: str) -> str:
    """Return the template that `--chat_template` names or the text of its file; lingowhale has none.

    Raises:
        ConfigError: neither a name nor a file that can be read and is Jinja.
    """
    if name in NAMED or name == "lingowhale":
        return NAMED.get(name, "")
    shown = f"--chat_template {name}: expected lingowhale, chatml, hermes or a Jinja file"
    text = read_text(Path(name).expanduser(), shown)
    try:
        jinja_parser().parse(text)
    except TemplateSyntaxError as error:
        raise ConfigError(f"--chat_template {name}, line {error.lineno}: not Jinja: {error.message}") from None
    return text


def jinja_parser() -> Environment:
    """Return what parses chat templates as transformers does."""
    return Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag])


class _GenerationTag(Extension):
    """What transformers adds to Jinja: `{% generation %}` around answers."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
