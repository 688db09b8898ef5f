"""Write an Ollama Modelfile beside a GGUF file: the chat template as a Go template, the end tokens, the system prompt.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md. The template is read off renderings: what stands between
the contents of a long conversation, the same in a short one. A template that does not repeat itself has no such form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from transformers import AutoTokenizer, GenerationConfig

from finetune.chat_templates.format_selection import jinja_parser
from finetune.models.loader import eos_token_ids
from finetune.utils.atomic_io import write_text_atomically

ROLES = ("system", "user", "assistant", "user", "assistant", "user")
CONTENTS = ("7c0f", "7c1f", "7c2f", "7c3f", "7c4f", "7c5f")  # found again in a rendering
LAST = "eq (len (slice $.Messages $i)) 1"
WITHOUT_TEMPLATE = (
    "# The chat template has no form as a Go template. Write it as TEMPLATE, see https://docs.ollama.com/modelfile"
)
WITHOUT_TOOLS = (
    "# Tools and tool calls are no part of TEMPLATE. vLLM, and llama-server --jinja, serve them by the chat template."
)


@dataclass(frozen=True)
class Pieces:
    """The texts around the contents of a conversation, up to the answer that is asked for."""

    before_system: str | None  # None: a system prompt is no part of the format
    after_system: str
    start: str  # without a system prompt
    after_user: str
    after_assistant: str
    prompt: str  # after the last user

    def go_template(self) -> str:
        """Return the format as a Go template over the messages of a conversation."""
        system = ""
        if self.before_system is not None:
            system = _when('eq .Role "system"', f"{self.before_system}{{{{ .Content }}}}{self.after_system}")
        user = _when("eq $i 0", self.start) + "{{ .Content }}" + _when(LAST, self.prompt, self.after_user)
        assistant = "{{ .Content }}" + _when(LAST, "", self.after_assistant)
        roles = system + _when('eq .Role "user"', user) + _when('eq .Role "assistant"', assistant)
        return f"{{{{ range $i, $_ := .Messages }}}}{roles}{{{{ end }}}}"

    def default_system(self) -> str | None:
        """Return the system prompt that the template writes where a conversation has none."""
        before, after = self.before_system, self.after_system
        if before is None or not (self.start.startswith(before) and self.start.endswith(after)):
            return None
        return self.start[len(before) : len(self.start) - len(after)].strip() or None


def write_modelfile(gguf: Path, template_kwargs: dict[str, Any] | None = None) -> Path:
    """Write `Modelfile` beside a GGUF file in a merged model's folder, whose tokenizer is read; return its path."""
    folder = gguf.parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig.from_pretrained(folder)
    stops = tokenizer.convert_ids_to_tokens(eos_token_ids(config))
    pieces = pieces_of(tokenizer, template_kwargs or {})
    lines = [f"FROM ./{gguf.name}"]
    if pieces is None:
        lines.append(WITHOUT_TEMPLATE)
    else:
        if "tools" in meta.find_undeclared_variables(jinja_parser().parse(tokenizer.get_chat_template())):
            lines.append(WITHOUT_TOOLS)
        lines.append(f'TEMPLATE """{pieces.go_template()}"""')
        if system := pieces.default_system():
            lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    path = folder / "Modelfile"
    write_text_atomically(path, "\n".join(lines) + "\n")
    return path


def pieces_of(tokenizer: Any, template_kwargs: dict[str, Any]) -> Pieces | None:
    """Return the texts around contents; None where the chat template is not regular, or has signs of a Modelfile."""

    def between(first: int, last: int) -> list[str] | None:
        messages = [{"role": ROLES[i], "content": CONTENTS[i]} for i in range(first, last)]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **template_kwargs
            )
        except (ValueError, jinja2.TemplateError):  # no template, or one that refuses a role
            return None
        bos, adds_bos = tokenizer.bos_token, tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return _split(text.removeprefix(bos) if bos and adds_bos else text, CONTENTS[first:last])

    plain, system = between(1, 6), between(0, 4)
    if plain is None:
        return None
    start, after_user, after_assistant, *_, prompt = plain
    is_regular = plain[3:5] == [after_user, after_assistant] and between(1, 2) == [start, prompt]
    if system is not None:
        is_regular &= system[2:] == [after_user, after_assistant, prompt] and between(0, 2) == [*system[:2], prompt]
    if not is_regular:
        return None
    texts = [*plain, *(system or [])]
    if any(sign in text for text in texts for sign in ('"""', "{{", "}}")):
        return None
    if after_user.startswith(prompt):  # the template knows no prompt; a space belongs to the first token of an answer
        prompt = after_user.rstrip(" ")
    before, after = (None, "") if system is None else (system[0], system[1])
    return Pieces(before, after, start, after_user, after_assistant, prompt)


def _when(condition: str, text: str, otherwise: str = "") -> str:
    return f"{{{{ if {condition} }}}}{text}{'{{ else }}' * bool(otherwise)}{otherwise}{{{{ end }}}}"


def _split(text: str, contents: Sequence[str]) -> list[str] | None:
    """Return the texts around contents that stand in this order, each once."""
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            return None
        parts.append(before)
    return [*parts, text]
