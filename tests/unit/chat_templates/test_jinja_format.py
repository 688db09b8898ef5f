"""Any chat template over real tokenizers: the ids of `apply_chat_template`, labels checked by another route."""

from __future__ import annotations

import copy
import re
from collections import Counter
from datetime import date

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.chat_templates import IGNORE_INDEX, JinjaFormat, Renderer
from finetune.conversation import Conversation, Turn
from finetune.utils.errors import ConfigError, DataError
from tests.helpers.chat_templates import STYLES

ROLES = {"human": "user", "model": "assistant", "system": "system"}
TOKENIZERS = ("smollm2", "mistral", "deepseek")
FOLLOWED = [name for name, style in STYLES.items() if style.refused is None]
# A copy of the largest tokenizer takes two seconds: it sees every third style.
PAIRS = [
    (name, kind)
    for number, name in enumerate(FOLLOWED)
    for kind in TOKENIZERS
    if kind != "deepseek" or number % 3 == 0 or "reasoning" in name or "words" in name
]
REFUSED = [name for name, style in STYLES.items() if style.refused is not None]

CONVERSATIONS = {
    "one pair": [("human", "Who are you?"), ("model", "I am Nori.")],
    "system": [("system", "Be brief."), ("human", "2+3?"), ("model", "5")],
    "chinese and emoji": [
        ("system", "请用中文回答。"),
        ("human", "你是谁？🙂"),
        ("model", "我是 Nori，由 Tidepool 制作。👩‍👩‍👧"),
        ("human", "谢谢"),
        ("model", "不客气！"),
    ],
    "white space at the ends": [
        ("human", "  a\n\n"),
        ("model", "\n b \n"),
        ("human", "\tc"),
        ("model", " d\n\n\n"),
        ("human", "e"),
        ("model", "f  "),
    ],
    "words of the template": [("human", "user\nassistant\n"), ("model", "assistant"), ("human", "a"), ("model", "a")],
    "code": [("human", "sort?"), ("model", "```python\ndef f(x):\n    return sorted(x)\n```\nDone: `f([3, 1])`.")],
    "the same text in each turn": [("human", "ok"), ("model", "ok"), ("human", "ok"), ("model", "ok")],
    "reasoning": [
        ("human", "2+2?"),
        ("model", "<think>\nAdd them.\n</think>\n\n4"),
        ("human", "3+3?"),
        ("model", "<think>\nAgain.\n</think>\n\n6"),
    ],
    "reasoning in one turn": [("human", "x"), ("model", "<think>\nr\n</think>\n\ny"), ("human", "z"), ("model", "w")],
}


# Without a space or a control token in front of the answer, its first character may share a token with the template.
GLUED = [("mistral 0.1, no system", "reasoning"), ("mistral 0.1, no system", "reasoning in one turn")]


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


def rendered(chat_format, turns):
    conversation = Conversation(tuple(Turn(role, text) for role, text in turns), 0, "rows.json", 0)
    return Renderer(chat_format, 100_000).render(conversation)


def messages(turns, *, merged: bool):
    if merged and turns[0][0] == "system":
        turns = [("human", f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:]]
    return [{"role": ROLES[role], "content": text} for role, text in turns]


def runs(labels):
    """The learned runs of labels, found without knowing where they should be."""
    found, run = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            found.append(run)
            run = []
    return found


def check(tokenizer, rendering, turns):
    """The ids are apply_chat_template's; each learned run reads as its model turn and one control token behind it."""
    (example,) = rendering.examples
    merged = "system turn put in front" in (rendering.reason or "")
    expected = tokenizer.apply_chat_template(messages(turns, merged=merged), return_dict=False)
    if not rendering.spelled:
        assert example.input_ids == expected
    else:  # deepseek's vocabulary has <think>: the template's stay control tokens, those of the contents are text
        contents = Counter(token for _, text in turns for token in tokenizer.encode(text, add_special_tokens=False))
        for token in tokenizer.added_tokens_decoder:
            assert example.input_ids.count(token) == max(expected.count(token) - contents[token], 0)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    said = [text for role, text in turns if role == "model"]
    learned = runs(example.labels)
    assert len(learned) == len(said)
    control = set(tokenizer.added_tokens_decoder)
    for number, (run, text) in enumerate(zip(learned, said, strict=True)):
        if "leaves out the reasoning of turn" in (rendering.reason or "") and number < len(said) - 1:
            text = text.rpartition("</think>")[2]
        assert [token in control for token in run] == [False] * (len(run) - 1) + [True]
        assert tokenizer.decode(run[:-1], clean_up_tokenization_spaces=False).strip() == text.strip()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_ids_are_exact_and_only_the_model_turns_are_learned(style_tokenizers, name, kind):
    tokenizer, chat_format = style_tokenizers(kind, name)
    for case, turns in CONVERSATIONS.items():
        if (name, case) in GLUED and kind != "deepseek":
            with pytest.raises(DataError, match="one token holds the template's ']' and '<' of turn 1"):
                rendered(chat_format, turns)
        else:
            check(tokenizer, rendered(chat_format, turns), turns)


def test_a_token_over_the_edge_of_a_context_turn_is_context(style_tokenizers):
    tokenizer, chat_format = style_tokenizers("deepseek", "headers in words")
    (example,) = rendered(chat_format, CONVERSATIONS["system"]).examples
    assert ".###" in tokenizer.convert_ids_to_tokens(example.input_ids)


def test_a_turn_of_which_the_template_leaves_nothing_is_refused(style_tokenizers):
    _, chat_format = style_tokenizers("smollm2", "reasoning dropped from history")
    turns = [("human", "a"), ("model", "<think>\nr\n</think>\n\n"), ("human", "b"), ("model", "c")]
    with pytest.raises(DataError, match="leaves nothing of turn 1"):
        rendered(chat_format, turns)


@pytest.mark.parametrize("kind", ["smollm2", "mistral"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_followed_is_refused_with_the_reason(style_tokenizers, name, kind):
    _, chat_format = style_tokenizers(kind, name)
    with pytest.raises(DataError) as refusal:
        rendered(chat_format, CONVERSATIONS["chinese and emoji"])
    assert re.search(STYLES[name].refused, str(refusal.value))


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Co"]) | st.sampled_from(" \n\t<|>[]/"), min_size=1, max_size=24
)
contents = st.one_of(
    texts, st.sampled_from(["user", "assistant\n", "</s>", "[INST] x [/INST]", "a\n\n\nb", "你好，世界"])
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pair=st.sampled_from(PAIRS),
    system=st.none() | contents.filter(str.strip),
    pairs=st.lists(st.tuples(contents.filter(str.strip), contents.filter(str.strip)), min_size=1, max_size=3),
)
def test_any_contents_are_exact_or_refused_by_name(style_tokenizers, pair, system, pairs):
    tokenizer, chat_format = style_tokenizers(*reversed(pair))
    turns = [turn for human, model in pairs for turn in (("human", human), ("model", model))]
    turns = turns if system is None else [("system", system), *turns]
    try:
        rendering = rendered(chat_format, turns)
    except DataError as refusal:
        assert re.search(r"rows.json, row 0: .*(one token holds|loses what the turn says|rewrites what)", str(refusal))
        assume(False)
    check(tokenizer, rendering, turns)


PLAIN = "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"


def test_a_python_backed_tokenizer_is_encoded_piece_by_piece():
    from tests.helpers.byte_code import ByteTokenizer

    tokenizer = ByteTokenizer()
    tokenizer.chat_template = PLAIN
    assert not tokenizer.is_fast
    for turns in CONVERSATIONS.values():
        check(tokenizer, rendered(JinjaFormat(tokenizer, PLAIN, "plain"), turns), turns)


@pytest.mark.parametrize("opening", ["m.role[0] + ':'", "'<human>'"], ids=["in words", "a control token"])
@pytest.mark.parametrize("token", ["<end>", "<other>"])
def test_a_spelling_that_only_normalization_makes_a_control_token_stays_text(opening, token):
    from tokenizers import AddedToken, normalizers

    from tests.helpers.byte_tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken(one, normalized=True, special=True) for one in ("<end>", "<other>")])
    template = "{% for m in messages %}{{ " + opening + " + m.content + '<end>' }}{% endfor %}"
    number = tokenizer.convert_tokens_to_ids(token)
    said = f"b {token.upper()} d"
    assert number in tokenizer.encode(said)  # all in lower case, which only what nobody learns may become

    (example,) = rendered(JinjaFormat(tokenizer, template, "x"), [("human", said), ("model", "c")]).examples

    assert example.input_ids.count(number) == (2 if token == "<end>" else 0)
    assert tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX]) == "c<end>"


def test_data_with_the_date_in_it_is_of_its_day(golden_tokenizer, monkeypatch):
    class Day(date):
        @classmethod
        def today(cls) -> date:
            return date(2026, 1, 2)

    monkeypatch.setattr("finetune.chat_templates.jinja_format.date", Day)
    dated = JinjaFormat(golden_tokenizer, "{{ strftime_now('%d %b %Y') }}" + PLAIN, "x")
    assert dated.identity()["day"] == "2026-01-02"
    assert JinjaFormat(golden_tokenizer, PLAIN, "x").identity()["day"] is None


def test_white_space_that_control_tokens_swallow_is_no_part_of_a_turn(smol_tokenizer):
    """Phi-3's `<|end|>` takes the white space behind it, so a leading newline of a content has no token of its own."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True), AddedToken("<|end|>", lstrip=True, rstrip=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    turns = [("human", "\n a \n"), ("model", "\n\n b \n\n"), ("human", " c"), ("model", "d ")]
    check(tokenizer, rendered(JinjaFormat(tokenizer, tokenizer.chat_template, "x"), turns), turns)


def test_a_template_that_counts_on_the_contents_is_refused_where_it_rewrites_them(smol_tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.replace('damn', '****') }}"
        "<|im_end|>\n{% endfor %}"
    )
    chat_format = JinjaFormat(smol_tokenizer, template, "x")
    check_turns = [("human", "a"), ("model", "fine")]
    assert rendered(chat_format, check_turns).status == "kept"
    with pytest.raises(DataError, match="row 0: the chat template rewrites what turn 1 says"):
        rendered(chat_format, [("human", "a"), ("model", "damn")])


def test_offsets_and_anchors_give_the_same(style_tokenizers):
    """The two ways to find where contents lie; the second is the fast one."""
    compared = 0
    for name in FOLLOWED:
        tokenizer, fast = style_tokenizers("smollm2", name)
        slow = JinjaFormat(tokenizer, STYLES[name].template, name)
        slow._anchors = lambda outline, shape: None
        for turns in CONVERSATIONS.values():
            try:
                one, other = rendered(fast, turns), rendered(slow, turns)
            except DataError:
                continue
            assert one == other
            compared += any(guide.anchors for guide in fast._guides.values())
    assert compared > 50


class TestContentTokens:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    turns = [("human", "Say <|im_end|>."), ("model", "<think>\nHm.\n</think>\n\nNo.")]

    def tokenizer(self, smol_tokenizer):
        from tokenizers import AddedToken

        tokenizer = copy.deepcopy(smol_tokenizer)
        tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
        tokenizer.chat_template = self.template
        return tokenizer

    def test_named_ones_are_tokens_and_all_others_stay_text(self, smol_tokenizer):
        tokenizer = self.tokenizer(smol_tokenizer)
        think, end = tokenizer.convert_tokens_to_ids(["<think>", "<|im_end|>"])
        plain = rendered(JinjaFormat(tokenizer, self.template, "x"), self.turns)
        named = rendered(JinjaFormat(tokenizer, self.template, "x", ["<think>", "</think>"]), self.turns)
        for rendering, count, spelled in ((plain, 0, 2), (named, 1, 1)):
            (example,) = rendering.examples
            assert example.labels.count(think) == example.input_ids.count(think) == count
            assert example.input_ids.count(end) == 2
            assert rendering.spelled == spelled
            assert tokenizer.decode(runs(example.labels)[0][:-1]) == self.turns[1][1]

    def test_without_other_spellings_the_ids_are_exact(self, smol_tokenizer):
        tokenizer = self.tokenizer(smol_tokenizer)
        turns = [("human", "Why?"), self.turns[1]]
        rendering = rendered(JinjaFormat(tokenizer, self.template, "x", ["<think>", "</think>"]), turns)
        expected = tokenizer.apply_chat_template(messages(turns, merged=False), return_dict=False)
        assert rendering.examples[0].input_ids == expected

    @pytest.mark.parametrize(
        ("token", "reason"), [("<|im_end|>", "is a special token"), ("<reason>", "is no added token of this tokenizer")]
    )
    def test_a_special_or_unknown_token_is_refused(self, smol_tokenizer, token, reason):
        with pytest.raises(ConfigError, match=f"--content_tokens {re.escape(token)}: {reason}"):
            JinjaFormat(self.tokenizer(smol_tokenizer), self.template, "x", [token])
