"""A template that cannot be followed is refused with the reason, and with what to do."""

import re

import pytest

from finetune.chat_templates import JinjaFormat, Renderer
from finetune.conversation import Conversation, ToolCall, Turn
from finetune.utils.errors import DataError

TURNS = "{% for m in messages %}{{ '<human>' if m.role != 'assistant' else '<model>' }}"
PLAIN = (Turn("human", "ab"), Turn("model", "cd"))
REASONED = (Turn("human", "ab"), Turn("model", "cd", reasoning="ef"))
PROMPT = "{% if add_generation_prompt %}<model>THINK{% endif %}"
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALLED = (Turn("human", "ab"), Turn("model", "", tool_calls=(ToolCall("f", {"x": 1}),)))
CALLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    + TURNS
    + "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ m.content }}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "turns", "reason", "remedy"),
    [
        (TURNS + "{{ m.content }}<|im_end|>{% endfor %}", PLAIN, "'<|im_end|>' is none in this tokenizer", "chatml"),
        (TURNS + "{{ m.content }}<|eot|>\n{% endfor %}", PLAIN, "'<|eot|>' is none in this tokenizer", "chatml"),
        (TURNS + "{{ m.content }}{% endfor %}<model>", PLAIN, "a token that opens turns (<model>)", "chatml"),
        (TURNS + "{{ m.content.split('</think>')[-1] }}</s>{% endfor %}", REASONED, "leaves out", "--reasoning drop"),
        (
            TURNS + "{{ m.content }}</s>{% endfor %}" + PROMPT.replace("THINK", "<think></think>"),
            REASONED, "has no reasoning, or closes it", "--chat_template_kwargs",
        ),
        (
            TURNS + "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}</s>{% endfor %}"
            + PROMPT.replace("THINK", "<think></think>"),
            REASONED, "has no reasoning, or closes it", "--chat_template_kwargs",
        ),
        ("{{ 'Q' if add_generation_prompt }}" + CALLS, CALLED, "writes another prompt in front of", "--chat_template"),
        (TURNS + "{{ m.content | upper }}</s>{% endfor %}", PLAIN, "rewrites the text of turn 0", "chatml"),
        (TURNS + "</s>{% endfor %}", PLAIN, "leaves out, repeats or rewrites turn 0", "chatml"),
        ("{{ raise_exception('one turn, please') }}", PLAIN, "refuses it: one turn, please", "chatml"),
        (TURNS + "{{ m.content }}</s>{% endfor %}", CALLED, "does not write declarations of tools", "hermes"),
    ],
)  # fmt: skip
def test_the_message_says_why_and_what_to_do(golden_tokenizer, template, turns, reason, remedy):
    tools = (TOOL,) if turns is CALLED else ()
    with pytest.raises(DataError, match=f"row 0: .*{re.escape(reason)}.*{re.escape(remedy)}"):
        Renderer(JinjaFormat(golden_tokenizer, template, "x"), 1000).render(
            Conversation(turns, 0, "rows.json", 0, tools=tools)
        )


@pytest.mark.parametrize("text", ["ef</think>\n\ncd", "ef\n</think>cd"])
def test_reasoning_of_which_only_the_end_is_given_is_opened_and_in_the_ledger(golden_tokenizer, text):
    chat_format = JinjaFormat(golden_tokenizer, TURNS + "{{ m.content }}</s>{% endfor %}", "x")
    opened, whole = (
        Renderer(chat_format, 1000).render(Conversation((PLAIN[0], Turn("model", answer)), 0, "rows.json"))
        for answer in (text, f"<think>\n{text}")
    )
    assert opened.examples == whole.examples
    assert "turn 1, of which only the end is given, is opened" in opened.reason and whole.reason is None
