"""The workarounds of transformers do what it does, and are still needed."""

import time

from finetune.chat_templates.compat import text_renderer
from finetune.chat_templates.format_selection import HERMES

TOOLS = [
    {"type": "function", "function": {"name": f"f{number}", "description": "d" * 50, "parameters": {
        "type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(8)}}}}
    for number in range(6)
]  # fmt: skip
CALL = {"type": "function", "function": {"name": "f0", "arguments": {"p0": "é\n", "p1": [1, None, True]}}}
CHAT = [
    {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": None},
    {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a", "reasoning_content": "why"},
]  # fmt: skip
READS_ALIASES = (
    "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.content }}{% endfor %}{{ eos_token }}"
)


def test_the_text_is_that_of_apply_chat_template(smol_tokenizer):
    render = text_renderer(smol_tokenizer)
    for template in (HERMES, READS_ALIASES):
        for options in ({}, {"tools": TOOLS}, {"add_generation_prompt": True}):
            expected = smol_tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, **options)
            assert render([CHAT], template, **options) == [expected]


def test_copying_tools_still_takes_longer_than_rendering_them(smol_tokenizer):
    def seconds(call):
        began = time.process_time()
        for _ in range(30):
            call()
        return time.process_time() - began

    render = text_renderer(smol_tokenizer)
    template = "{{ tools | length }}"
    ours = lambda: render([CHAT], template, tools=TOOLS)  # noqa: E731
    theirs = lambda: smol_tokenizer.apply_chat_template(  # noqa: E731
        CHAT, chat_template=template, tools=TOOLS, tokenize=False
    )
    ours(), theirs()
    assert min(seconds(theirs) / seconds(ours) for _ in range(3)) > 2
