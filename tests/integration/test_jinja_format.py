"""Any chat template over real tokenizers: the ids of `apply_chat_template`, labels checked by another route."""

import copy
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.chat_templates import JinjaFormat
from finetune.utils.errors import DataError
from tests.helpers.chat_templates import STYLES
from tests.helpers.template_checks import CONVERSATIONS, check, contents, rendered
from tests.helpers.tiers import mostly_slow

TOKENIZERS = ("smollm2", "mistral", "deepseek")


FOLLOWED = [name for name, style in STYLES.items() if style.refused is None]


# A copy of the largest tokenizer takes two seconds: it sees every third style.
PAIRS = [
    (name, kind)
    for number, name in enumerate(FOLLOWED)
    for kind in TOKENIZERS
    if kind != "deepseek" or number % 3 == 0 or "reasoning" in name or "words" in name
]


FAST_PAIRS = [
    *[pair for pair in PAIRS if pair[1] == "smollm2"][::2],
    ("mistral 0.1, no system", "mistral"),
    ("reasoning dropped from history", "smollm2"),
]
REFUSED = [name for name, style in STYLES.items() if style.refused is not None]


@pytest.fixture(scope="session")
def style_tokenizers(real_tokenizers):
    """One copy of each tokenizer per style, with the style's control tokens."""
    made = {}

    def tokenizer(kind: str, name: str):
        if (kind, name) not in made:
            style = STYLES[name]
            one = copy.deepcopy(real_tokenizers[kind])
            one.add_special_tokens(
                {
                    "additional_special_tokens": list(style.tokens),
                    **({"bos_token": style.bos} if style.bos else {}),
                    **({"eos_token": style.eos} if style.eos else {}),
                }
            )
            one.chat_template = style.template
            made[kind, name] = one, JinjaFormat(one, style.template, name)
        return made[kind, name]

    return tokenizer


@pytest.mark.parametrize(("name", "kind"), mostly_slow(PAIRS, FAST_PAIRS))
def test_ids_are_exact_and_only_the_model_turns_are_learned(style_tokenizers, name, kind):
    tokenizer, chat_format = style_tokenizers(kind, name)
    for turns in CONVERSATIONS.values():
        check(tokenizer, rendered(chat_format, turns), turns)


def test_a_token_over_the_edge_of_a_context_turn_is_context(style_tokenizers):
    tokenizer, chat_format = style_tokenizers("deepseek", "headers in words")
    (example,) = rendered(chat_format, CONVERSATIONS["system"]).examples
    assert ".###" in tokenizer.convert_ids_to_tokens(example.input_ids)


def test_a_turn_of_which_the_template_leaves_nothing_is_refused(style_tokenizers):
    _, chat_format = style_tokenizers("smollm2", "reasoning dropped from history")
    turns = [("human", "a"), ("model", "<think>\nr\n</think>\n\n"), ("human", "b"), ("model", "c")]
    with pytest.raises(DataError, match="(leaves nothing of|rewrites the text of) turn 1"):
        rendered(chat_format, turns)


@pytest.mark.parametrize("kind", mostly_slow(["smollm2", "mistral"], ["smollm2"]))
@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_followed_is_refused_with_the_reason(style_tokenizers, name, kind):
    _, chat_format = style_tokenizers(kind, name)
    with pytest.raises(DataError) as refusal:
        rendered(chat_format, CONVERSATIONS["chinese and emoji"])
    assert re.search(STYLES[name].refused, str(refusal.value))


turns_of_text = {
    "system": st.none() | contents.filter(str.strip),
    "pairs": st.lists(st.tuples(contents.filter(str.strip), contents.filter(str.strip)), min_size=1, max_size=3),
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pair=st.sampled_from(FAST_PAIRS), **turns_of_text)
def test_any_contents_are_exact_or_refused_by_name(style_tokenizers, pair, system, pairs):
    check_texts(style_tokenizers, pair, system, pairs)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(pair=st.sampled_from(PAIRS), **turns_of_text)
def test_in_any_style_any_contents_are_exact_or_refused_by_name(style_tokenizers, pair, system, pairs):
    check_texts(style_tokenizers, pair, system, pairs)


def check_texts(style_tokenizers, pair, system, pairs):
    tokenizer, chat_format = style_tokenizers(*reversed(pair))
    turns = [turn for human, model in pairs for turn in (("human", human), ("model", model))]
    turns = turns if system is None else [("system", system), *turns]
    try:
        rendering = rendered(chat_format, turns)
    except DataError as refusal:
        reasons = "does not preserve|rewrites the text|encoded in parts"
        assert re.search(rf"rows.json, row 0: .*({reasons})", str(refusal))
        assume(False)
    check(tokenizer, rendering, turns)


def test_offsets_and_control_tokens_give_the_same(style_tokenizers):
    """The two ways to find where turns lie; the second is the fast one."""
    compared = 0
    for name in [name for name, kind in FAST_PAIRS if kind == "smollm2"]:
        tokenizer, fast = style_tokenizers("smollm2", name)
        slow = JinjaFormat(tokenizer, STYLES[name].template, name)
        slow.positions.by_controls = lambda *_, **__: None
        for turns in CONVERSATIONS.values():
            try:
                one, other = rendered(fast, turns), rendered(slow, turns)
            except DataError:
                continue
            assert one == other
            compared += 1
    assert compared > 50
