"""Each answer stands behind the prompt that a server sends, whatever tools and reasoning a conversation has."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from finetune.chat_templates import IGNORE_INDEX, JinjaFormat, Renderer
from finetune.conversation import ChatSettings, Conversation
from finetune.utils.errors import DataError
from tests.helpers.template_families import FAMILIES, prepared
from tests.helpers.tiers import mostly_slow
from tests.helpers.tool_conversations import (
    conversations,
    expected_call,
    gemma_call,
    marked_text,
    parsed_calls,
    served_messages,
)

# Drawn conversations that a template refuses, with the reason; any other refusal is an error.
REFUSED = {
    "deepseek": "leaves out the reasoning",
    "deepseek r1": "leaves out the reasoning",  # after results of tools its prompt opens none
    "qwen3, no thinking": "has no reasoning, or closes it",
}
# A sentencepiece tokenizer writes spaces in front of what is encoded by itself.
SPELLED = {"mistral": "the row spells a control token, so its texts are encoded in parts"}
FAST = ("qwen3", "llama3.1", "mistral", "glm4.5", "gpt-oss", "phi4-mini")
QUICK = settings(
    deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None
)  # shrinking a conversation takes minutes


@pytest.fixture(scope="session")
def families(real_tokenizers):
    """The tokenizer and the chat format of each family, made once."""
    made = {}

    def a_family(name: str):
        if name not in made:
            family = FAMILIES[name]
            tokenizer = prepared(copy.deepcopy(real_tokenizers[family.tokenizer]), family)
            made[name] = (
                tokenizer,
                JinjaFormat(tokenizer, family.template, name, ChatSettings(template_kwargs=family.kwargs)),
            )
        return made[name]

    return a_family


def runs(example):
    """(start, stop) of each supervised run."""
    labels = [*example.labels, IGNORE_INDEX]
    starts = [place for place in range(1, len(labels)) if labels[place] != IGNORE_INDEX == labels[place - 1]]
    return [(start, labels.index(IGNORE_INDEX, start)) for start in starts]


def served(tokenizer, name, template, conversation, count, **options):
    """What a server makes of the first `count` turns."""
    messages = served_messages(FAMILIES[name], conversation)[:count]
    options |= dict(FAMILIES[name].kwargs) | ({"tools": list(conversation.tools)} if conversation.tools else {})
    return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **options)


def check(name, tokenizer, chat_format, conversation):
    """Compare each answer with what a server sends and reads; return how many there are."""
    supervised = []
    rendering = Renderer(chat_format, 100_000).render(conversation)
    if rendering.spelled:  # Hypothesis draws constants of the code: a server would make control tokens of them
        return 0
    for example in rendering.examples:
        numbers = {span.start: span.turn for span in example.turn_spans if span.role == "model"}
        ids, labels = example.input_ids, example.labels
        for start, stop in runs(example):
            number, run = numbers[start], labels[start:stop]
            assert run == ids[start:stop]
            before = served(tokenizer, name, chat_format.templates[0], conversation, number, add_generation_prompt=True)
            whole = served(tokenizer, name, chat_format.templates[0], conversation, number + 1)
            assert ids[:start] == before
            check_answer(name, tokenizer, conversation.turns[number], before, run, whole)
            supervised.append(number)
    assert sorted(supervised) == [number for number, turn in enumerate(conversation.turns) if turn.is_supervised]
    return len(supervised)


def check_answer(name, tokenizer, turn, before, run, whole):
    """The run is the rest of the turn as the template writes it, and a server reads the same calls from it."""
    said, opening = marked_text(tokenizer, run), tokenizer.decode(before)
    assert run[-1] in tokenizer.added_tokens_decoder
    if opening.rstrip().endswith("<think>"):
        reasoning, _, answer = turn.text.removeprefix("<think>").rpartition("</think>")
        expected = f"{(turn.reasoning or reasoning).strip()}\n</think>\n\n{answer.strip()}"
        assert tokenizer.decode(run).startswith(expected)
    elif whole[: len(before)] == before:
        told = [*before, *run]
        assert told[: len(whole)] == whole[: len(told)] and len(told) <= len(whole) + 1
        assert tokenizer.decode(whole[len(told) :]).strip() in ("", FAMILIES[name].eos)
    else:  # the tokenizer joins the prompt's end with what follows, or the template leaves out history once answered
        assert marked_text(tokenizer, whole).rstrip().endswith((said, said[: said.rindex("\ue100")]))
    if name == "gemma4":
        assert "".join(map(gemma_call, turn.tool_calls)) in said
    elif turn.tool_calls:
        assert parsed_calls(name, said) == [expected_call(name, call) for call in turn.tool_calls]


def check_drawn(families, name, data):
    conversation = data.draw(conversations(FAMILIES[name]))
    if not any(turn.is_supervised for turn in conversation.turns):
        return
    try:
        check(name, *families(name), conversation)
    except DataError as refusal:
        assert name in REFUSED and REFUSED[name] in str(refusal)
        event("refused")


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, FAST))
@settings(QUICK, max_examples=12)
@given(data=st.data())
def test_each_answer_stands_behind_the_prompt_of_a_server(families, name, data):
    check_drawn(families, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@settings(QUICK, max_examples=400)
@given(data=st.data())
def test_many_answers_stand_behind_the_prompt_of_a_server(families, name, data):
    check_drawn(families, name, data)


def harmless(family, conversation: Conversation) -> Conversation:
    """The conversation with other letters for each control token that it spells."""

    def change(text: str) -> str:
        for token in (*family.special, *family.added, "</s>"):
            text = text.replace(f"x{token}y", "xzqy").replace(f"Say {token}!", "Say zq!")
        return text

    def change_all(value):
        return json.loads(change(json.dumps(value, ensure_ascii=False).replace('<|\\"|>', '<|"|>')))

    turns = tuple(
        replace(
            turn,
            text=change(turn.text),
            reasoning=change(turn.reasoning),
            tool_calls=tuple(replace(call, arguments=change_all(call.arguments)) for call in turn.tool_calls),
        )
        for turn in conversation.turns
    )
    return replace(conversation, turns=turns, tools=tuple(change_all(tool) for tool in conversation.tools))


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, FAST))
@settings(QUICK, max_examples=12)
@given(data=st.data())
def test_a_control_token_that_any_string_spells_stays_text(families, name, data):
    """Arguments, declarations, results and texts: the control tokens are those of the same row without spellings."""
    family, (tokenizer, chat_format) = FAMILIES[name], families(name)
    conversation = data.draw(conversations(family, spelled=True))
    if not any(turn.is_supervised for turn in conversation.turns):
        return
    try:
        examples = Renderer(chat_format, 100_000).render(conversation).examples
    except DataError as refusal:
        assert REFUSED.get(name, "-") in str(refusal) or SPELLED.get(name, "-") in str(refusal)
        return
    plain = Renderer(chat_format, 100_000).render(harmless(family, conversation)).examples
    for example, other in zip(examples, plain, strict=True):
        control = chat_format.plain.control_ids
        for ids, other_ids in ((example.input_ids, other.input_ids), (example.labels, other.labels)):
            assert [i for i in ids if i in control] == [i for i in other_ids if i in control]
        numbers = {span.start: span.turn for span in example.turn_spans if span.role == "model"}
        for start, stop in runs(example):
            turn = conversation.turns[numbers[start]]
            if turn.tool_calls and name != "gemma4":
                said = marked_text(tokenizer, example.labels[start:stop])
                assert parsed_calls(name, said) == [expected_call(name, call) for call in turn.tool_calls]
