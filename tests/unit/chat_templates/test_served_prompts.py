# ruff: noqa: E501 (templates read best as they are)
"""Each answer is supervised behind the prompt of serving, in templates that write something else around answers."""

import copy

import pytest

from finetune.chat_templates import IGNORE_INDEX, Renderer
from finetune.chat_templates.format_selection import CHATML, HERMES, select_chat_format
from finetune.conversation import BadRow, Conversation, ToolCall, Turn
from finetune.utils.errors import ConfigError
from tests.helpers.served_prompts import PLAIN, ROLES, TALK, prompts_and_answers, renderer_of, served_ids

# The system turn stands with the last question, as long as nobody has answered it.
MISTRAL_2407 = r"""
{%- if messages[0].role == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}{% else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for message in rest %}
{%- if message.role == 'user' %}{{- '[INST]' + (system + '\n\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
{%- else %}{{- message.content + eos_token }}{% endif %}
{%- endfor %}"""
# There is no generation prompt; closed reasoning stands at the end of everything.
HUNYUAN = r"""
{%- for message in messages %}
{{- '<|startoftext|>' if message.role == 'user' or loop.first }}{{- message.content + {'user': '<|extra_0|>', 'system': '<|extra_4|>', 'assistant': '<|eos|>'}[message.role] }}
{%- endfor %}
{{- '<think>\n\n</think>\n' if enable_thinking is defined and not enable_thinking }}"""
# Every prompt opens reasoning; answers without it are written without it.
OPENS = r"""
{{- tools | tojson if tools }}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- message.content }}{% for call in message.tool_calls or [] %}{{- '\n<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}{{- '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"""
# The token of the next turn ends an answer.
NEXT_ROLE = r"""
{%- for message in messages %}{{- '<|' + message.role + '|>\n' + message.content }}{% endfor %}{{- '<|assistant|>\n' if add_generation_prompt }}"""

CASES = {
    "mistral": (MISTRAL_2407, "[INST] [/INST] <s> </s>", PLAIN, {}, ["a</s>", "a2</s>"]),
    "hunyuan": (HUNYUAN, "<|startoftext|> <|extra_0|> <|extra_4|> <|eos|>", PLAIN, {"enable_thinking": False}, ["a<|eos|>", "a2<|eos|>"]),
    "none": (OPENS, "<|im_start|> <|im_end|>", TALK, {}, ["r\n</think>\n\na<|im_end|>", "\n</think>\n\na2<|im_end|>"]),
    "blank line": (OPENS.replace("<think>\\n' if", "<think>\\n\\n' if"), "<|im_start|> <|im_end|>", TALK, {}, ["r\n</think>\n\na<|im_end|>", "\n</think>\n\na2<|im_end|>"]),
    "next role": (NEXT_ROLE, "<|user|> <|assistant|> <|system|>", (*PLAIN[1:3], *PLAIN[:1], *PLAIN[3:]), {}, ["a<|user|>", "a2<|user|>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_ids_in_front_of_an_answer_are_those_of_serving(smol_tokenizer, name):
    template, special, turns, kwargs, answers = CASES[name]
    renderer = renderer_of(smol_tokenizer, template, special, kwargs)
    found = prompts_and_answers(renderer, Conversation(turns, 0, "a.json"))

    assert [text for _, text in found] == answers
    numbers = [number for number, turn in enumerate(turns) if turn.role == "model"]
    for number, (ids, _) in zip(numbers, found, strict=True):
        messages = [
            {"role": ROLES[turn.role], "content": turn.text}
            | ({"reasoning_content": turn.reasoning} if turn.reasoning else {})
            for turn in turns[:number]
        ]
        options = {"chat_template": template, "add_generation_prompt": True, "return_dict": False, **kwargs}
        assert ids == renderer.format.tokenizer.apply_chat_template(messages, **options)


ROLE_TAGS = "{%- for message in messages %}{{- '<|' + message.role + '|>' }}"
OPENS_AND_TAGS = OPENS.replace(
    "{{- message.content }}",
    "{{- '<reply>' + message.content if message.content and message.role == 'assistant' else message.content }}",
).replace("\\n<tool_call>", "<tool_call>")
ROLES_END = "<|user|> <|assistant|> <|system|> <|end|>"
# What templates write in front of an answer and behind it -> the answers after "q" and "q2".
WRITTEN = {
    # `<reply>` begins as the `<think>` that the prompt opens does.
    "tag behind reasoning": (OPENS_AND_TAGS, "<|im_start|> <|im_end|>", ["\n</think>\n\n<reply>a<|im_end|>", "\n</think>\n\n<reply>a2<|im_end|>"]),
    # The question itself ends with what opens the answer.
    "opened by the question": ("{%- for message in messages %}{{- message.content + '<|assistant|><think>' if message.role == 'user' else '</think>' + message.content + '<|end|>' }}{% endfor %}", ROLES_END, ["</think>a<|end|>", "</think>a2<|end|>"]),
    "tag and next role": (ROLE_TAGS + "{{- '<tool_call>' + message.content + '</tool_call>' if message.role == 'assistant' else message.content }}{% endfor %}{{- '<|assistant|>' if add_generation_prompt }}", ROLES_END, ["<tool_call>a</tool_call><|user|>", "<tool_call>a2</tool_call><|user|>"]),
    "line and next role": (ROLE_TAGS + "{{- message.content + '\\n' }}{% endfor %}{{- '<|assistant|>' if add_generation_prompt }}", ROLES_END, ["a\n<|user|>", "a2\n<|user|>"]),
    "plain text": (ROLE_TAGS + "{{- message.content + '<|end|>' }}{% endfor %}{{- '<|assistant|>Steps:\\n' if add_generation_prompt }}", ROLES_END, ["a<|end|>", "a2<|end|>"]),
    # As Cohere's templates, which write the prompt whether it is asked for or not, and Kimi-K3's.
    "prompt at every end": (ROLE_TAGS + "{{- '<reply>' + message.content if message.role == 'assistant' else message.content }}{{- '<|end|>' }}{% endfor %}{{- '<|assistant|>' }}", ROLES_END, ["<reply>a<|end|>", "<reply>a2<|end|>"]),
    "prompt of another kind at every end": (ROLE_TAGS + "{{- message.content + '<|end|>' }}{% endfor %}{{- '<|assistant|><empty>' }}", ROLES_END, ["a<|end|>", "a2<|end|>"]),
    "text between end tokens": (ROLE_TAGS + "{{- message.content + '<|close|>' + message.role + '<|sep|><|end|>' }}{% endfor %}{{- '<|assistant|>' if add_generation_prompt }}", "<|close|> <|sep|> " + ROLES_END, ["a<|close|>assistant<|sep|><|end|>", "a2<|close|>assistant<|sep|><|end|>"]),
    # As Laguna's, whose end token is no eos_token.
    "closing tag of the prompt": ("{%- for message in messages %}{{- '<' + message.role + '>' + message.content + '</' + message.role + '>\\n' }}{% endfor %}{{- '<assistant>' if add_generation_prompt }}", "<user> </user> <assistant> </assistant> <|end|>", ["a</assistant>", "a2</assistant>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_answers_are_whole_however_they_are_opened_and_closed(smol_tokenizer, name):
    template, special, answers = WRITTEN[name]
    renderer = renderer_of(smol_tokenizer, template, special, {})
    found = prompts_and_answers(renderer, Conversation(PLAIN[1:], 0, "a.json"))

    assert [text for _, text in found] == answers
    for count, (ids, _) in zip((1, 3), found, strict=True):
        messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in PLAIN[1 : count + 1]]
        options = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
        assert ids == renderer.format.tokenizer.apply_chat_template(messages, **options)


def test_a_call_keeps_its_first_character_behind_a_prompt_that_opens_reasoning(smol_tokenizer):
    # Without these tokens, "<think>" and "<tool_call>" have their first character in common.
    renderer = renderer_of(smol_tokenizer, OPENS_AND_TAGS.replace("tool_call>", "call>"), "<|im_start|> <|im_end|>", {})
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    turns = (TALK[1], Turn("model", "", tool_calls=(ToolCall("f", {"x": 1}),)))
    ((_, answer),) = prompts_and_answers(renderer, Conversation(turns, 0, "a.json", None, (), (tool,)))

    assert answer.startswith("\n</think>\n\n<call>{")


# SmolLM3 and Nemotron: a word of a turn closes reasoning, and is taken out of some turns.
WORDS = r"""
{%- set ns = namespace(thinks=true) %}{% for message in messages %}{% if message.role != 'assistant' and '/no_think' in message.content %}{% set ns.thinks = false %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + (message.content.replace('/no_think', '').strip() if message.role == 'system' else message.content) + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' + ('' if ns.thinks else '<think></think>') if add_generation_prompt }}"""


@pytest.mark.parametrize("system", ["/no_think", "Be brief. /no_think", "Be /no_think brief."])
@pytest.mark.parametrize("question", ["q", "/no_think", "q2 /no_think"])
def test_words_that_a_template_looks_for_decide_as_in_serving(smol_tokenizer, system, question):
    renderer = renderer_of(smol_tokenizer, WORDS, "<|im_start|> <|im_end|>", {})
    for begin in (0, 1):  # without the system turn, too
        turns = (Turn("system", system), TALK[1], PLAIN[2], Turn("human", question), TALK[4])[begin:]
        found = prompts_and_answers(renderer, Conversation(turns, 0, "a.json"))
        assert [text for _, text in found] == ["a<|im_end|>", "a2<|im_end|>"]
        for (ids, _), count in zip(found, (2 - begin, 4 - begin), strict=True):
            messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in turns[:count]]
            options = {"chat_template": WORDS, "add_generation_prompt": True, "return_dict": False}
            assert ids == renderer.format.tokenizer.apply_chat_template(messages, **options)


# Cohere's: what a model plans in front of calls has a key of its own, and reasoning elsewhere has none.
PLANS = r"""
{{- tools | tojson if tools }}
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}{{- message.content if not message.tool_calls }}
{%- for call in message.tool_calls or [] %}{{- '<plan>' + message.tool_plan + '</plan>' if loop.first and message.tool_plan }}{{- call.function | tojson }}{% endfor %}{{- '<|end|>' }}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}"""


@pytest.mark.parametrize("beside", [True, False])
def test_reasoning_in_front_of_calls_is_the_plan_of_templates_that_have_one(smol_tokenizer, beside):
    renderer = renderer_of(smol_tokenizer, PLANS, "<|user|> <|assistant|> <|tool|> <|end|>", {})
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    text, reasoning = ("", "p") if beside else ("<think>\np\n</think>\n", "")
    call = Turn("model", text, reasoning=reasoning, tool_calls=(ToolCall("f", {"x": 1}),))
    conversation = Conversation((TALK[1], call, Turn("tool", "r"), PLAIN[2]), 0, "a.json", None, (), (tool,))
    answers = [answer for _, answer in prompts_and_answers(renderer, conversation)]

    assert answers == ['<plan>p</plan>{"name": "f", "arguments": {"x": 1}}<|end|>', "a<|end|>"]


def test_conversations_with_tools_take_the_template_for_tools(smol_tokenizer):
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.chat_template = {"default": CHATML, "tool_use": HERMES}
    chat_format, _ = select_chat_format(tokenizer)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    for tools in ((), (tool,)):
        found = prompts_and_answers(Renderer(chat_format, 10_000), Conversation(PLAIN, 0, "a.json", None, (), tools))
        for (ids, _), count in zip(found, (2, 4), strict=True):
            messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in PLAIN[:count]]
            options = {"tools": [*tools] or None, "add_generation_prompt": True, "return_dict": False}
            assert ids == tokenizer.apply_chat_template(messages, **options)

    tokenizer.chat_template = {"tool_use": HERMES}
    with pytest.raises(ConfigError, match="no default chat template, only tool_use"):
        select_chat_format(tokenizer)


@pytest.mark.parametrize("text", ["a", "Steps:\na"])
def test_plain_text_that_opens_every_answer_is_said_and_not_supervised_again(smol_tokenizer, text):
    template, special, _ = WRITTEN["plain text"]
    renderer = renderer_of(smol_tokenizer, template, special, {})
    conversation = Conversation((TALK[1], Turn("model", text)), 0, "a.json")
    ((prompt, answer),) = prompts_and_answers(renderer, conversation)

    assert renderer.format.tokenizer.decode(prompt).endswith("<|assistant|>Steps:\n") and answer == "a<|end|>"
    assert "'Steps:'" in renderer.render(conversation).reason


# The last question is marked, so no earlier answer stands behind the prompt of serving.
MARKED = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + ('!' if message.role == 'user' and loop.revindex <= 2 else '') + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""


@pytest.mark.parametrize(("history", "num_examples"), [("as_served", 2), ("as_is", 1)])
def test_as_is_supervises_all_answers_where_the_template_writes_them(smol_tokenizer, history, num_examples):
    renderer = renderer_of(smol_tokenizer, MARKED, "<|im_start|> <|im_end|>", {}, history=history)
    conversation = Conversation(PLAIN[1:], 0, "a.json")
    messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in conversation.turns]
    examples = renderer.render(conversation).examples

    whole = renderer.format.tokenizer.apply_chat_template(messages, chat_template=MARKED, return_dict=False)
    assert len(examples) == num_examples and examples[-1].input_ids == whole
    assert [text for _, text in prompts_and_answers(renderer, conversation)] == ["a<|im_end|>", "a2<|im_end|>"]


# Nothing ends an answer but the token of the next role, and every prompt opens reasoning.
OPENS_ROLES = r"""
{{- tools | tojson if tools }}
{%- for message in messages %}
{{- '<|' + message.role + '|>' + ('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '') + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{%- endfor %}
{{- '<|assistant|><think>' if add_generation_prompt }}"""


@pytest.mark.parametrize(
    ("template", "special", "reasoning", "answers"),
    [
        (OPENS, "<|im_start|> <|im_end|>", "", ["t\n%s<|im_end|>", "done<|im_end|>"]),
        (
            OPENS_ROLES,
            "<|user|> <|assistant|> <|tool|> <|eos|>",
            "r",
            ["r</think>t%s<|tool|>", "r</think>done<|user|>"],
        ),
    ],
)
def test_as_is_supervises_calls_and_their_end(smol_tokenizer, template, special, reasoning, answers):
    renderer = renderer_of(smol_tokenizer, template, special, {}, history="as_is")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    call = Turn("model", "t", reasoning=reasoning, tool_calls=(ToolCall("f", {"x": 1}),))
    turns = (TALK[1], call, Turn("tool", "result"), Turn("model", "done", reasoning=reasoning))
    found = prompts_and_answers(renderer, Conversation(turns, 0, "a.json", None, (), (tool,)))

    written = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    assert [text for _, text in found] == [answers[0] % written, answers[1]]


def test_an_answer_does_not_begin_at_the_header_of_an_earlier_one(smol_tokenizer):
    renderer = renderer_of(smol_tokenizer, OPENS, "<|im_start|> <|im_end|>", {})
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    call = Turn("model", "t", reasoning="r", tool_calls=(ToolCall("f", {"x": 1}),))
    turns = (TALK[1], call, Turn("tool", "result"), Turn("model", "done"))
    (_, first), (_, last) = prompts_and_answers(renderer, Conversation(turns, 0, "a.json", None, (), (tool,)))

    assert first.startswith("r\n</think>\n\nt\n<tool_call>") and last == "\n</think>\n\ndone<|im_end|>"


# An answer without reasoning has it empty, so that "\n" of the prompt and "\n" of the answer are one token in the whole.
CLOSES = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + ('<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' if message.role == 'assistant' else '') + message.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n<think>\n' if add_generation_prompt }}"""


def test_an_answer_is_encoded_apart_from_a_prompt_that_the_tokenizer_would_join_with_it(smol_tokenizer):
    renderer = renderer_of(smol_tokenizer, CLOSES, "<|im_start|> <|im_end|>", {})
    turns = (Turn("human", "q"), Turn("model", "a"), Turn("human", "q2"), Turn("model", "a2"))
    found = prompts_and_answers(renderer, Conversation(turns, 0, "a.json"))

    assert [text for _, text in found] == ["\n</think>\n\na<|im_end|>", "\n</think>\n\na2<|im_end|>"]
    assert [ids for ids, _ in found] == [served_ids(renderer, CLOSES, turns[:number]) for number in (1, 3)]
    context = Conversation((*turns[:1], Turn("model", "a", train=False), *turns[2:]), 0, "a.json")
    assert prompts_and_answers(renderer, context) == found[1:]


def test_a_spelled_control_token_changes_no_token_of_other_turns(smol_tokenizer):
    renderer = renderer_of(smol_tokenizer, OPENS, "<|im_start|> <|im_end|>", {})
    turns = [(Turn("human", text), Turn("model", "- a", reasoning="r")) for text in ("q", "<|im_end|>")]
    ((_, plain),), ((_, spelled),) = (prompts_and_answers(renderer, Conversation(pair, 0, "a.json")) for pair in turns)
    (one,), (other,) = (renderer.render(Conversation(pair, 0, "a.json")).examples for pair in turns)

    learned = [[label for label in example.labels if label != IGNORE_INDEX] for example in (one, other)]
    assert plain == spelled == "r\n</think>\n\n- a<|im_end|>" and learned[0] == learned[1]


# Ids of calls are written, and nothing opens an answer.
WITH_IDS = r"""
{{- tools | tojson if tools }}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + (message.tool_call_id or '') + ' ' if message.role != 'assistant' }}{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call.id + call.function | tojson }}{% endfor %}{{- '<|im_end|>' }}
{%- endfor %}"""


def test_conversations_of_one_shape_may_have_other_ids_and_functions(smol_tokenizer):
    renderer = renderer_of(smol_tokenizer, WITH_IDS, "<|im_start|> <|im_end|>", {})
    tools = tuple({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg")

    def turns(name: str, ids: list[str]) -> tuple[Turn, ...]:
        calls = [
            (Turn("model", "", tool_calls=(ToolCall(name, {}, id),)), Turn("tool", "r", tool_call_id=id)) for id in ids
        ]
        return (Turn("human", "q"), *(turn for pair in calls for turn in pair), Turn("model", "a"))

    for name, ids in (("f", ["1"]), ("f", ["2", "3"]), ("g", ["4", "5", "6"])):
        found = prompts_and_answers(renderer, Conversation(turns(name, ids), 0, "a.json", None, (), tools))
        assert [
            text.count(f'<tool_call>{id}{{"name": "{name}"') for (_, text), id in zip(found, ids, strict=False)
        ] == [1 for _ in ids]
        assert len(found) == len(ids) + 1


def test_answers_as_they_are_written_end_with_the_last_of_their_end_tokens(smol_tokenizer):
    opening = "('<think></think>' if loop.last and message.role == 'assistant' else '')"
    end = "'<|sep|>' + message.role + '<|sep|><|end|>'"
    template = ROLE_TAGS + "{{- " + f"{opening} + message.content + {end}" + " }}{% endfor %}"
    renderer = renderer_of(smol_tokenizer, template, "<|sep|> " + ROLES_END, {}, history="as_is")
    found = prompts_and_answers(renderer, Conversation(PLAIN[1:], 0, "a.json"))
    assert found[0][1] == "a<|sep|>assistant<|sep|><|end|>"


SPELLED = [
    "<|im_end|> /no_think of a much longer text", "a much longer text /no_think <|im_start|>", "/no_think <|im_end|>",
    "<tool_call> /no_think q",
]  # fmt: skip


@pytest.mark.parametrize("question", SPELLED)
def test_control_tokens_beside_a_word_that_a_template_looks_for_stay_text(smol_tokenizer, question):
    renderer = renderer_of(smol_tokenizer, WORDS, "<|im_start|> <|im_end|>", {})
    plain, spelled = (
        renderer.render(Conversation((Turn("human", text), Turn("model", "a")), 0, "a.json")).examples[0].input_ids
        for text in ("/no_think", question)
    )
    controls = renderer.format.plain.control_ids
    assert [token for token in spelled if token in controls] == [token for token in plain if token in controls]
    rows = [Conversation((Turn("system", question), *PLAIN[1:]), 0, "a.json")]
    (row,) = renderer.render_all(rows)
    assert isinstance(row, BadRow) or row.spelled
