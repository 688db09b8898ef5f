"""Reasoning in front of calls, ends of calls, and variables of rows, in templates of several families."""

import copy

import pytest

from finetune.chat_templates import IGNORE_INDEX, JinjaFormat, LingoWhaleFormat, Renderer
from finetune.chat_templates.messages import sample_tool
from finetune.conversation import BadRow, ChatSettings, Conversation, ToolCall, Turn
from tests.helpers.template_families import FAMILIES, prepared

PLAIN = (Turn("human", "q"), Turn("model", "answer"))


def renderer(smol_tokenizer, family: str, *, masks: bool = False, **options) -> Renderer:
    tokenizer = prepared(copy.deepcopy(smol_tokenizer), FAMILIES[family])
    chat_format = JinjaFormat(
        tokenizer, tokenizer.chat_template, family, ChatSettings(reasoning="context" if masks else "learn")
    )
    return Renderer(chat_format, 10_000, **options)


def supervised(renderer: Renderer, conversation: Conversation) -> list[str]:
    """The supervised text of each example."""
    tokenizer = renderer.format.tokenizer
    labels = [example.labels for example in renderer.render(conversation).examples]
    return [tokenizer.decode([label for label in row if label != IGNORE_INDEX]) for row in labels]


def called(name: str, text: str) -> Conversation:
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"x": {}}}}}
    turns = (Turn("human", "q"), Turn("model", text, tool_calls=(ToolCall(name, {"x": "1"}),)))
    return Conversation((*turns, Turn("tool", "RESULT"), Turn("model", "<think>WHY</think>Done")), tools=(tool,))


@pytest.mark.parametrize("family", ["hermes", "qwen3", "deepseek r1"])
def test_dropped_reasoning_is_that_in_front_of_calls_too(smol_tokenizer, family):
    texts = supervised(renderer(smol_tokenizer, family, drops_reasoning=True), called("weather", "<think>WHY</think>"))
    assert "weather" in "".join(texts) and "Done" in "".join(texts) and "WHY" not in "".join(texts)


@pytest.mark.parametrize("drops", [True, False])
def test_reasoning_that_cannot_be_told_from_the_answer_is_a_fault(smol_tokenizer, drops):
    texts = (
        "<think>a</think>b<think>c</think>d",
        "Well. <think>a</think>b",
        "<|begin_of_thought|>a<|end_of_thought|>b",
    )
    rows = [Conversation((PLAIN[0], Turn("model", text)), 0, "a.json") for text in (*texts, "<think>a</think>b")]
    *bad, good = renderer(smol_tokenizer, "hermes", masks=not drops, drops_reasoning=drops).render_all(rows)
    for row in bad:
        assert isinstance(row, BadRow) and "turn 1: --reasoning drop and context know reasoning that" in row.reason
    assert good.status == "kept"


@pytest.mark.parametrize(("family", "opening"), [("qwen3", "<think>\n"), ("gpt-oss", "<|channel|>analysis<|message|>")])
@pytest.mark.parametrize("masks", [False, True])
def test_an_opening_of_reasoning_that_is_context_counts_as_not_supervised(smol_tokenizer, family, opening, masks):
    row = Conversation((PLAIN[0], Turn("model", "<think>\nWHY\n</think>\n\nDone")))
    assert renderer(smol_tokenizer, family, masks=masks).render(row).openings == ((opening, not masks),)


@pytest.mark.parametrize("name", ["f", "end", "sentence"])
def test_a_call_ends_with_its_own_token_whatever_the_function_is_called(smol_tokenizer, name):
    first, last = supervised(renderer(smol_tokenizer, "deepseek r1", drops_reasoning=True), called(name, ""))
    assert first.endswith("<｜tool▁calls▁end｜><｜end▁of▁sentence｜>") and last == "Done<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("opening", ["[THINK]", "<think>\n"])
@pytest.mark.parametrize("header", ["", "model:\n"])
def test_the_model_opens_its_reasoning_where_the_template_has_no_generation_prompt(smol_tokenizer, opening, header):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_start|>' }}{% else %}"
        "{{ HEADER }}{{ OPENING + m.reasoning_content + '[END]' if m.reasoning_content }}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    )
    template = template.replace("HEADER", repr(header)).replace("OPENING", repr(opening))
    turns = (*PLAIN, PLAIN[0], Turn("model", "answer", reasoning="why"))
    (text,) = supervised(Renderer(JinjaFormat(smol_tokenizer, template, "x"), 1000), Conversation(turns))
    assert text == f"answer<|im_end|>{opening}why[END]answer<|im_end|>"


@pytest.mark.parametrize("family", ["qwen3", "phi4", "lingowhale"])
def test_variables_of_a_row_that_a_template_does_not_use_are_said_or_refused(smol_tokenizer, golden_tokenizer, family):
    chat = renderer(smol_tokenizer, "phi4" if family == "lingowhale" else family)
    if family == "lingowhale":
        chat = Renderer(LingoWhaleFormat(golden_tokenizer, [3], [4]), 1000)
    rows = [Conversation(PLAIN, 0, "a.json", template_kwargs=kwargs) for kwargs in (
        {"enable_thinking": True, "unknown": ""}, {"enable_thinking": True, "custom_instructions": "Be brief."},
    )]  # fmt: skip
    kept, bad = chat.render_all(rows)
    assert kept.reason == (None if family == "qwen3" else "the chat template does not use enable_thinking of the row")
    assert isinstance(bad, BadRow) and "does not use custom_instructions of the row" in bad.reason


STEPS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|result|>' + m.content }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<|call|>' + call.ID + call.function | tojson }}{% endfor %}"
    "{{ '<|result|>' if m.tool_calls else '<|im_end|>' }}{% endif %}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt and messages[-1].role != 'tool' }}"
)


@pytest.mark.parametrize("own_id", [None, "c-1"])
def test_a_template_may_quote_declarations_demand_ids_and_write_no_prompt_behind_results(smol_tokenizer, own_id):
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|result|>"]})
    declared = "{% for tool in tools or [] %}{% for value in tool.function.parameters.properties.values() %}"
    declared += "{{ value.description + ' ' }}{% endfor %}{{ tool }}{% endfor %}"
    call = ToolCall("weather", {"x": "1"}, own_id)
    turns = (PLAIN[0], Turn("model", "", tool_calls=(call,)), Turn("tool", "r", tool_call_id=own_id), PLAIN[1])
    row = Conversation(turns, tools=(sample_tool("weather", "x", "d"),))
    chat = Renderer(JinjaFormat(tokenizer, declared + STEPS.replace("ID", "id[:4]"), "x"), 1000)
    written = f'<|call|>{own_id or "call"}{{"name": "weather", "arguments": {{"x": "1"}}}}<|result|>'
    assert supervised(chat, row) == [f"{written}<|im_start|>assistant\nanswer<|im_end|>"]


@pytest.mark.parametrize("text", ["<think>\n\n</think>\n\nb", "<think></think>b"])
def test_an_empty_reasoning_is_supervised_where_the_template_has_no_generation_prompt(smol_tokenizer, text):
    template = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    row = Conversation((PLAIN[0], Turn("model", text)))
    assert supervised(Renderer(JinjaFormat(smol_tokenizer, template, "x"), 1000), row) == [f"{text}<|im_end|>"]
