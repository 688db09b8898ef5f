"""What is served is what was trained: the prompt, the answer's text, the tokens that end it, the text as it comes."""

import copy

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.chat_templates import (
    IGNORE_INDEX,
    JinjaFormat,
    LingoWhaleFormat,
    Renderer,
    answer_text,
    end_token_ids,
    prompt_ids,
    select_chat_format,
)
from finetune.conversation import ChatSettings, Conversation, Turn
from finetune.utils.errors import DataError
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.chat_templates import STYLES
from tests.helpers.tiers import mostly_slow

FOLLOWED = [name for name, style in STYLES.items() if style.refused is None]


# A copy of the largest tokenizer takes two seconds: it sees three styles.
FORMATS = [
    *((kind, own) for kind in ("smollm2", "mistral", "deepseek") for own in ("lingowhale", "chatml")),
    ("smollm2", "its own"),
    ("smollm2", "content tokens"),
    ("bytes", "lingowhale"),
    ("python", "plain"),
    *((kind, name) for kind in ("smollm2", "mistral") for name in FOLLOWED),
    *(("deepseek", name) for name in ("deepseek", "headers in words", "reasoning dropped from history")),
]


FAST_FORMATS = [pair for pair in FORMATS[:10] if pair[0] != "deepseek"]
for kind, step in (("smollm2", 3), ("mistral", 8)):
    FAST_FORMATS += [pair for pair in FORMATS[10:] if pair[0] == kind][::step]
PLAIN = "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"


THINKING = ["<think>", "</think>"]


@pytest.fixture(scope="session")
def served(real_tokenizers):
    """(tokenizer, format) -> a chat format, made once."""
    made = {}

    def a_format(kind: str, name: str):
        if (kind, name) not in made:
            made[kind, name] = make(kind, name)
        return made[kind, name]

    def make(kind: str, name: str):
        if kind == "python":
            from tests.helpers.byte_code import ByteTokenizer

            return JinjaFormat(ByteTokenizer(), PLAIN, name)
        tokenizer = byte_tokenizer() if kind == "bytes" else copy.deepcopy(real_tokenizers[kind])
        if name == "lingowhale":
            return LingoWhaleFormat(tokenizer, [3], [4])
        if name == "chatml":
            return select_chat_format(tokenizer, name)[0]
        if name == "its own":
            return select_chat_format(tokenizer)[0]
        if name == "content tokens":
            from tokenizers import AddedToken

            tokenizer.add_tokens([AddedToken(token, special=False) for token in THINKING])
            return select_chat_format(tokenizer, "chatml", ChatSettings(content_tokens=THINKING))[0]
        style = STYLES[name]
        named = {"bos_token": style.bos, "eos_token": style.eos}
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(style.tokens), **{key: one for key, one in named.items() if one}}
        )
        return JinjaFormat(tokenizer, style.template, name)

    return a_format


def trained(chat_format, turns):
    """The ids of a training row with these turns: before its last answer, and that answer with its end."""
    *_, example = Renderer(chat_format, 100_000).render(Conversation(tuple(turns), 0, "rows.json")).examples
    labels = [*example.labels, IGNORE_INDEX]
    last = max(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
    first = last
    while labels[first - 1] != IGNORE_INDEX:
        first -= 1
    return example.input_ids[:first], labels[first : last + 1]


def check(chat_format, turns):
    """Behind what is served for each question stands, in training, what is learned; its text is the answer's."""
    plain, compared = chat_format.plain, 0
    for number, turn in enumerate(turns):
        if turn.role != "model":
            continue
        try:
            before, learned = trained(chat_format, turns[: number + 1])
        except DataError:
            continue
        asked = Conversation(tuple(turns[:number]))
        prompt = prompt_ids(chat_format, asked)
        if turn.text[0].isspace() and prompt != before:
            # A tokenizer may join the white space that an answer begins with and the template's own.
            assert len({plain.decode_all([ids])[0].rstrip() for ids in (before, prompt)}) == 1
            continue
        assert before[: len(prompt)] == prompt
        of_the_template = before[len(prompt) :]
        assert plain.decode_all([of_the_template])[0].strip() == ""
        assert learned[-1] in end_token_ids(chat_format)
        said = [*of_the_template, *learned[:-1]]
        text = answer_text(chat_format, asked, prompt, said)
        assert text.strip() == turn.text.strip()
        # kept in the history, it is rendered to the same ids again
        again, learned_again = trained(chat_format, [*turns[:number], Turn("model", text)])
        assert (again, learned_again) == (before, learned)
        compared += 1
    return compared


CONVERSATIONS = [
    [("human", "Who are you?"), ("model", "I am Nori.")],
    [
        ("human", "你是谁？🙂"),
        ("model", "我是 Nori。👩‍👩‍👧"),
        ("human", "谢谢"),
        ("model", "不客气！"),
        ("human", "1+1?"),
        ("model", "2"),
    ],
    [("system", "请简短。"), ("human", "2+3?"), ("model", "5"), ("human", "6?"), ("model", "Yes, 6.")],
    [("human", "What does <|im_end|> do, or </s>?"), ("model", "It ends a turn."), ("human", "ok"), ("model", "Fine.")],
    [("human", "  a\n\n"), ("model", "\n b \n"), ("human", "\tc"), ("model", " d\n\n\n")],
    [("human", "x"), ("model", "<think>\nr\n</think>\n\ny"), ("human", "z"), ("model", "<think>\ns\n</think>\n\nw")],
    [("human", "sort?"), ("model", "```python\nsorted(x)\n```\nDone."), ("human", "ok"), ("model", "- a\n- b\n")],
]


# Templates whose ends are words: a space before the answer is the template's, yet part of its first token.
IN_WORDS = {"vicuna", "openchat", "llama 2", "mistral 0.3, system in the last user turn", "mistral 0.1, no system"}


@pytest.mark.parametrize(("kind", "name"), mostly_slow(FORMATS, FAST_FORMATS))
def test_the_prompt_is_what_training_rendered(served, kind, name):
    chat_format, compared = served(kind, name), 0
    for turns in CONVERSATIONS:
        turns = [Turn(role, text) for role, text in turns]
        compared += check(chat_format, turns)
        if name not in IN_WORDS and not any("\n b" in turn.text for turn in turns):
            for number, turn in enumerate(turns):
                if turn.role == "model":
                    try:
                        before, _ = trained(chat_format, turns[: number + 1])
                    except DataError as error:
                        assert "spells a control token" in str(error)
                        continue
                    assert prompt_ids(chat_format, Conversation(tuple(turns[:number]))) == before
    assert compared >= 8


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Co"]) | st.sampled_from(" \n\t<|>[]/"), min_size=1, max_size=24
)


contents = st.one_of(
    texts,
    st.sampled_from(
        ["user", "assistant\n", "</s>", "<|im_end|>", "[INST] x [/INST]", "a\n\n\nb", "你好，世界", "🙂", " 1"]
    ),
).filter(str.strip)


turns_of_text = {
    "system": st.none() | contents,
    "pairs": st.lists(st.tuples(contents, contents), min_size=1, max_size=3),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pair=st.sampled_from(FAST_FORMATS), **turns_of_text)
def test_any_conversation_is_served_as_it_was_trained(served, pair, system, pairs):
    check_texts(served, pair, system, pairs)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, derandomize=True)
@given(pair=st.sampled_from(FORMATS), **turns_of_text)
def test_in_any_format_any_conversation_is_served_as_it_was_trained(served, pair, system, pairs):
    check_texts(served, pair, system, pairs)


def check_texts(served, pair, system, pairs):
    chat_format = served(*pair)
    turns = [] if system is None else [Turn("system", system)]
    for human, model in pairs:
        # An answer that spells a control token makes its whole row be encoded piece by piece, which no prompt can know;
        # where contents lie between control tokens, or are always encoded by themselves, that is the same.
        same = pair[1] == "lingowhale" or (pair[1] in ("chatml", "its own") and pair[0] != "mistral")
        assume(same or not chat_format.plain.spells_control_token(model))
        turns += [Turn("human", human), Turn("model", model)]
    check(chat_format, turns)
