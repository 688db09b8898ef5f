# ruff: noqa: E501 (templates read best as they are)
"""Where answers end, and where reasoning and texts stand, in templates that write them in their own way."""

from os.path import commonprefix

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.chat_templates.answer_ends import common_size
from finetune.conversation import Conversation, ToolCall, Turn
from tests.helpers.served_prompts import PLAIN, ROLES, TALK, prompts_and_answers, renderer_of, served_ids

# Another token ends the last turn, as in Olmo 3.
OTHER_END = r"""
{{- tools | tojson if tools }}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}{% for call in message.tool_calls or [] %}{{- '<call>' + call.function | tojson + '</call>' }}{% endfor %}{{- eos_token if loop.last and message.role == 'assistant' else '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""


@pytest.mark.parametrize("special", ["<|im_start|> <|im_end|> <eos>", "<|im_start|> <call> </call> <|im_end|> <eos>"])
def test_a_call_ends_with_the_token_of_the_last_turn(smol_tokenizer, special):
    renderer = renderer_of(smol_tokenizer, OTHER_END, special, {})
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    turns = (TALK[1], Turn("model", "", tool_calls=(ToolCall("f", {}),)), Turn("tool", "r"), Turn("model", "a"))
    found = prompts_and_answers(renderer, Conversation(turns, 0, "a.json", None, (), (tool,)))

    assert [text for _, text in found] == ['<call>{"name": "f", "arguments": {}}</call><eos>', "a<eos>"]


# What closes an answer stands on lines of its own, in front of the end token; phi3's `eos_token` ends all turns together.
CLOSED_BY_LINES = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + ('<response>\n' + message.content + '\n</response>\n' if message.role == 'assistant' else message.content) + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"""


@pytest.mark.parametrize(
    "special", ["<|im_start|> <|im_end|> <eos>", "<|im_start|> <response> </response> <|im_end|> <eos>"]
)
def test_an_answer_ends_behind_what_closes_it(smol_tokenizer, special):
    renderer = renderer_of(smol_tokenizer, CLOSED_BY_LINES, special, {})
    found = prompts_and_answers(renderer, Conversation(PLAIN, 0, "a.json"))

    assert [text for _, text in found] == [f"<response>\n{text}\n</response>\n<|im_end|>" for text in ("a", "a2")]
    assert [ids for ids, _ in found] == [served_ids(renderer, CLOSED_BY_LINES, PLAIN[:number]) for number in (2, 4)]


# Reasoning is a part of the content, and a name of a function is written as a part of the id of a call.
PARTS = r"""
{{- tools | tojson if tools }}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + ':' }}
{%- if message.content is string %}{{- message.content }}{% else %}
{%- for part in message.content %}{{- '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}{{- '<call>' + call.id + call.function.arguments | tojson + '</call>' }}{% endfor %}{{- '<|im_end|>' }}
{%- endfor %}
{{- '<|im_start|>assistant:' if add_generation_prompt }}"""


def test_reasoning_that_a_template_takes_as_a_part_of_the_content_is_given_so(smol_tokenizer):
    special = "<|im_start|> [THINK] [/THINK] <call> </call> <|im_end|>"
    renderer = renderer_of(smol_tokenizer, PARTS, special, {})
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    for answer in (Turn("model", "a", reasoning="r"), Turn("model", "<think>\nr\n</think>\n\na")):
        called = Turn("model", "", reasoning="r", tool_calls=(ToolCall("f", {"x": 1}, "id-1"),))
        turns = (TALK[1], called, Turn("tool", "y", tool_call_id="id-1"), answer)
        found = prompts_and_answers(renderer, Conversation(turns, 0, "a.json", None, (), (tool,)))

        call = '[THINK]r[/THINK]<call>functions.f:0{"x": 1}</call><|im_end|>'
        assert [text for _, text in found] == [call, "[THINK]r[/THINK]a<|im_end|>"]


# The reasoning of an answer without calls is never written, as in Kimi-K2-Thinking.
EMPTY = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + ('<think>GAP</think>' if message.role == 'assistant' else '') + message.content + '<|im_end|>' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""


@pytest.mark.parametrize("gap", ["", "\\n\\n"])
def test_reasoning_stands_where_the_template_writes_none(smol_tokenizer, gap):
    template = EMPTY.replace("GAP", gap)
    renderer = renderer_of(smol_tokenizer, template, "<|im_start|> <|im_end|>", {})
    line = "\n" * bool(gap)
    inside = (*TALK[:2], Turn("model", "<think>\nr\n</think>\n\na"), *TALK[3:])
    for turns in (TALK, inside):
        found = prompts_and_answers(renderer, Conversation(turns, 0, "a.json"))

        assert [text for _, text in found] == [
            f"<think>{line}r{line}</think>a<|im_end|>",
            f"<think>{line * 2}</think>a2<|im_end|>",
        ]
        assert [ids for ids, _ in found] == [served_ids(renderer, template, turns) for turns in (TALK[:2], PLAIN[:4])]


# As in LLaVA's and SmolVLM's templates, a content is a list of parts; a string would be lost.
LISTS = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + ': ' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{%- for part in message.content | selectattr('type', 'equalto', 'text') %}{{- part.text }}{% endfor %}{{- '<|im_end|>' }}
{%- endfor %}
{{- '<|im_start|>assistant:' if add_generation_prompt }}"""


def test_texts_are_parts_where_a_template_reads_only_these(smol_tokenizer):
    renderer = renderer_of(smol_tokenizer, LISTS, "<|im_start|> <|im_end|>", {})
    found = prompts_and_answers(renderer, Conversation(TALK, 0, "a.json"))

    assert [text for _, text in found] == [" <think>r</think>a<|im_end|>", " a2<|im_end|>"]
    messages = [{"role": ROLES[turn.role], "content": [{"type": "text", "text": turn.text}]} for turn in TALK]
    options = {"chat_template": LISTS, "add_generation_prompt": True, "return_dict": False}
    assert found[0][0] == renderer.format.tokenizer.apply_chat_template(messages[:2], **options)


@given(st.text("ab", max_size=9), st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_texts_have_their_longest_common_beginning_in_common(shared, first, second):
    texts = [shared + first, shared + second]
    assert common_size(*texts) == len(commonprefix(texts))
