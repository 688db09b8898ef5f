"""Generated ids become turns: calls in the syntax of each template, reasoning, and everything else as text."""

import pytest

from finetune.chat_templates import JinjaFormat, answer_ids, decode_after, end_token_ids, prompt_ids, select_chat_format
from finetune.conversation import Conversation, ToolCall, Turn
from finetune.inference.answer_turns import ReasoningText, answer_turn, pieces_to_show
from tests.helpers.byte_tokenizer import byte_tokenizer

TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "Looks something up.", "parameters": {
        "type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}}}}
    for name in ("get_weather", "get-time")
)  # fmt: skip
ASKED = Conversation((Turn("human", "Weather in Bergen?"),), tools=TOOLS)
CALL = ToolCall("get_weather", {"place": 'Bergen "x"\n{1}', "days": 3})
NO_ARGUMENTS = ToolCall("get-time", {})

FRAME = (  # a template around the calls of a message, with reasoning as Qwen3 has it
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
    "\n</think>\n\n{% endif %}{{ m.content }}{% if m.tool_calls %}"
    "{% set calls = m.tool_calls | map(attribute='function') %}{calls}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GPT_OSS = (
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json"
    "<|message|>{{ m.tool_calls[0].function.arguments | tojson }}"
    "<|call|>{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
FAMILIES = {
    "json in tags": '{% for c in calls %}\n<tool_call>\n{"name": "{{ c.name }}", "arguments": '
    "{{ c.arguments | tojson }}}\n</tool_call>{% endfor %}",
    "a list": '[TOOL_CALLS] [{% for c in calls %}{{ \', \' if not loop.first }}{"name": "{{ c.name }}", '
    '"arguments": {{ c.arguments | tojson }}}{% endfor %}]',
    "a bare object": '{% for c in calls %}{"name": "{{ c.name }}", "parameters": '
    "{{ c.arguments | tojson }}}{% endfor %}",
    "name before arguments": "{% for c in calls %}[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}{% endfor %}",
    "parameters": "{% for c in calls %}\n<tool_call>\n<function={{ c.name }}>\n{% for k, v in "
    "c.arguments | items %}<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}",
    "arg_key": "{% for c in calls %}\n<tool_call>{{ c.name }}\n{% for k, v in c.arguments | items %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}"
    "</tool_call>{% endfor %}",
    "python": "[{% for c in calls %}{{ ', ' if not loop.first }}{{ c.name }}({% for k, v in c.arguments | items %}"
    "{{ ', ' if not loop.first }}{{ k }}={{ v | tojson }}{% endfor %}){% endfor %}]",
    "deepseek": "<｜tool▁calls▁begin｜>{% for c in calls %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "{{ c.name }}\n```json\n{{ c.arguments | tojson }}\n```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>",
}
TOKENS = ["<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|start|>", "<|channel|>", "<|message|>", "<|end|>",
          "<|call|>", "<|return|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
          "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    return tokenizer


@pytest.fixture(scope="module")
def formats(tokenizer):
    made = {name: JinjaFormat(tokenizer, FRAME.replace("{calls}", calls), name) for name, calls in FAMILIES.items()}
    hermes = select_chat_format(byte_tokenizer(), "hermes")[0]
    return {**made, "gpt-oss": JinjaFormat(tokenizer, GPT_OSS, "gpt-oss"), "hermes": hermes}


def generated(chat_format, turn, conversation=ASKED):
    """The prompt, and what a model that has learned the turn writes, without the token that it stops at."""
    prompt = prompt_ids(chat_format, conversation)
    ids = answer_ids(chat_format, conversation, prompt, turn)
    assert ids[-1] in end_token_ids(chat_format)
    return prompt, ids[:-1]


NAMES = [*FAMILIES, "gpt-oss", "hermes"]
TURNS = [
    Turn("model", "", tool_calls=(CALL,)),
    Turn("model", "", tool_calls=(NO_ARGUMENTS,)),
    Turn("model", "", reasoning="It is asked for.\n\nSo I look.", tool_calls=(CALL,)),
    Turn("model", "It rains.", reasoning="Rain {1}."),
    Turn("model", "It rains."),
    Turn("model", 'As JSON: {"name": "Bergen", "rain": true}'),
    Turn("model", "", tool_calls=(CALL, NO_ARGUMENTS)),
    Turn("model", "Let me look.", tool_calls=(CALL,)),
]
# A message of gpt-oss holds one call and no text beside it; a list of Python is read where it is all of an answer.
HELD = {"gpt-oss": TURNS[:6], "python": [*TURNS[:2], *TURNS[3:7]]}
PAIRS = [(name, turn) for name in NAMES for turn in HELD.get(name, TURNS)]


@pytest.mark.parametrize(("name", "turn"), PAIRS)
def test_a_turn_is_read_back_from_what_its_template_writes(formats, name, turn):
    assert answer_turn(formats[name], ASKED, *generated(formats[name], turn)) == turn


def test_white_space_in_a_call_may_differ(formats, tokenizer):
    prompt = prompt_ids(formats["json in tags"], ASKED)
    ids = tokenizer.encode(
        '<tool_call>{"name":"get_weather","arguments":{"days":3}}</tool_call>', add_special_tokens=False
    )
    assert answer_turn(formats["json in tags"], ASKED, prompt, ids).tool_calls == (
        ToolCall("get_weather", {"days": 3}),
    )


@pytest.mark.parametrize("other", [name for name in NAMES if name not in ("json in tags", "hermes")])
def test_another_syntax_is_text(formats, other):
    _, ids = generated(formats[other], Turn("model", "", tool_calls=(CALL,)))
    prompt = prompt_ids(formats["json in tags"], ASKED)
    turn = answer_turn(formats["json in tags"], ASKED, prompt, ids)
    assert turn.tool_calls == () and "get_weather" in turn.text


def test_calls_are_read_only_where_tools_are_declared(formats):
    chat_format = formats["a bare object"]
    _, ids = generated(chat_format, Turn("model", "", tool_calls=(CALL,)))
    asked = Conversation(ASKED.turns)
    assert answer_turn(chat_format, asked, prompt_ids(chat_format, asked), ids).tool_calls == ()


@pytest.mark.parametrize(("name", "turn"), [
    ("json in tags", Turn("model", "It rains.", reasoning="Rain?\n\n</thin")),
    ("json in tags", Turn("model", "<thinly> It rains.")),
    ("gpt-oss", Turn("model", "It rains.", reasoning="Rain?")),
    ("gpt-oss", Turn("model", "final")),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_openings_are_not_shown_and_reasoning_is_told_apart(formats, name, turn, size):
    chat_format = formats[name]
    prompt, ids = generated(chat_format, turn)
    text = decode_after(chat_format.plain, prompt, ids)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    shown = [*pieces_to_show(pieces, chat_format, ASKED, prompt)]
    of_reasoning = [piece for piece in shown if isinstance(piece, ReasoningText)]
    assert "".join(of_reasoning).strip() == turn.reasoning
    assert "".join(piece for piece in shown if not isinstance(piece, ReasoningText)).strip() == turn.text
