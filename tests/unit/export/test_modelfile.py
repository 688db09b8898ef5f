"""The Go template of a Modelfile renders what the chat template renders."""

import re
from copy import deepcopy
from pathlib import Path

import pytest
from transformers import GenerationConfig

from finetune.export.model_files import LINGOWHALE_TEMPLATE
from finetune.export.modelfile import pieces_of, write_modelfile
from tests.helpers.chat_templates import STYLES
from tests.helpers.template_families import FAMILIES, prepared
from tests.helpers.tiers import mostly_slow

SYSTEM = [{"role": "system", "content": "Be brief."}]
TURNS = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Whose?"},
]
NAMES = [*(name for name, style in STYLES.items() if style.refused is None), *FAMILIES]
FAST = ("chatml", "chatml, default system", "llama 3", "mistral 0.3, system in the last user turn", "gemma3",
        "qwen3, no thinking")  # fmt: skip


def go(template: str, messages: list[dict]) -> str:
    """Render the part of Go's text/template that a Modelfile uses."""
    words = re.split(r"\{\{ (.*?) \}\}", template)
    assert words[:2] == ["", "range $i, $_ := .Messages"] and words[-2:] == ["end", ""]
    out = []
    for i, message in enumerate(messages):
        shows = [True]
        for kind, word in zip("ta" * len(words), words[2:-2], strict=False):
            if kind == "t":
                out += [word] if all(shows) else []
            elif word == ".Content":
                out += [message["content"]] if all(shows) else []
            elif word == "end":
                shows.pop()
            elif word == "else":
                shows[-1] = not shows[-1]
            else:
                role = re.fullmatch(r'if eq \.Role "(\w+)"', word)
                truth = {"if eq $i 0": i == 0, "if eq (len (slice $.Messages $i)) 1": i == len(messages) - 1}
                shows.append(message["role"] == role[1] if role else truth[word])
        assert shows == [True]
    return "".join(out)


def of_style(tokenizer, name: str):
    tokenizer = deepcopy(tokenizer)
    if name in FAMILIES:
        return prepared(tokenizer, FAMILIES[name]), dict(FAMILIES[name].kwargs)
    style = STYLES[name]
    named = {"bos_token": style.bos, "eos_token": style.eos}
    tokenizer.add_special_tokens({key: token for key, token in named.items() if token})
    tokenizer.add_special_tokens({"additional_special_tokens": list(style.tokens)})
    tokenizer.chat_template = style.template
    return tokenizer, {}


@pytest.mark.parametrize("name", mostly_slow(NAMES, FAST))
def test_it_renders_what_the_chat_template_renders(name, smol_tokenizer):
    tokenizer, kwargs = of_style(smol_tokenizer, name)
    pieces = pieces_of(tokenizer, kwargs)
    template, asks = pieces.go_template(), "add_generation_prompt" in tokenizer.chat_template
    for system in [[], SYSTEM] if pieces.before_system is not None else [[]]:
        for turns in (TURNS[:1], TURNS):
            text = tokenizer.apply_chat_template(system + turns, tokenize=False, add_generation_prompt=True, **kwargs)
            rendered = go(template, system + turns)
            assert rendered == text if asks else rendered.startswith(text) and rendered.endswith(pieces.prompt)


def written(folder: Path, tokenizer, template: str) -> str:
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(folder)
    return write_modelfile(folder / "m-q8_0.gguf").read_text().partition("\n")


def test_it_names_the_file_the_default_system_prompt_and_the_end_tokens(smol_tokenizer, tmp_path):
    first, _, rest = written(tmp_path, smol_tokenizer, STYLES["chatml, default system"].template)
    assert first == "FROM ./m-q8_0.gguf"
    assert 'SYSTEM """You are a helpful assistant"""\n' in rest
    assert rest.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n')
    rest = written(tmp_path, smol_tokenizer, STYLES["chatml"].template)[2]
    assert "SYSTEM" not in rest and rest.startswith("TEMPLATE")


def test_it_says_that_tools_are_left_out(smol_tokenizer, tmp_path):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + STYLES["chatml"].template
    assert "Tools and tool calls are no part of TEMPLATE" in written(tmp_path, smol_tokenizer, template)[2]


@pytest.mark.parametrize("template", [
    "{{ messages|length }}{% for m in messages %}<{{ m.content }}>{% endfor %}",
    "{% for m in messages %}<{{ loop.index }}{{ m.content }}>{% endfor %}",
    "{% for m in messages %}{{ '{{' }}{{ m.content }}{% endfor %}",
])  # fmt: skip
def test_a_template_without_such_a_form_leaves_a_comment(template, smol_tokenizer, tmp_path):
    _, _, rest = written(tmp_path, smol_tokenizer, template)
    assert rest.startswith("# The chat template has no form") and 'TEMPLATE "' not in rest and "stop" in rest


def test_the_format_of_lingowhale_has_one(smol_tokenizer):
    tokenizer = deepcopy(smol_tokenizer)
    tokenizer.chat_template = LINGOWHALE_TEMPLATE % {"human": "<h>", "model": "<m>", "end": "</s>"}
    assert go(pieces_of(tokenizer, {}).go_template(), SYSTEM + TURNS) == (
        "<h>Be brief.\n\nWho are you?<m>A model.<h>Whose?<m>"
    )
