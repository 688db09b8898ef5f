"""Any chat template over real tokenizers: the ids of `apply_chat_template`, labels checked by another route."""

import copy
import json
import re
from datetime import UTC, date, datetime

import pytest

from finetune.chat_templates import IGNORE_INDEX, JinjaFormat, UnrenderableError, chat_template, tokenize_conversation
from finetune.chat_templates.chat_template import ChatTemplate
from finetune.chat_templates.plain_text import PlainTextTokenizer
from finetune.conversation import ChatSettings, Conversation, Turn
from finetune.dataset.data_summary import DataTally
from finetune.utils.errors import ConfigError, DataError
from tests.helpers.template_checks import CONVERSATIONS, check, messages, rendered, runs

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


def test_a_template_that_writes_the_date_writes_one_for_all_conversations(golden_tokenizer):
    dated = JinjaFormat(golden_tokenizer, "{{ strftime_now('%d %b %Y') }}" + PLAIN, "x", day=date(2026, 1, 2))
    (example,) = rendered(dated, [("human", "a"), ("model", "b")]).examples
    assert golden_tokenizer.decode(example.input_ids).startswith("02 Jan 2026")
    assert dated.identity()["day"] == "2026-01-02"
    assert JinjaFormat(golden_tokenizer, "{{ strftime_now('%d') }}" + PLAIN, "x").day == datetime.now(UTC).date()
    assert JinjaFormat(golden_tokenizer, PLAIN, "x").identity()["day"] is None


def test_white_space_that_the_template_strips_from_an_answer_is_in_the_ledger(golden_tokenizer):
    stripping = JinjaFormat(golden_tokenizer, PLAIN.replace("m.content", "(m.content | trim)"), "x")
    assert rendered(stripping, [("human", " a"), ("model", "b")]).reason is None
    assert "strips white space around answers" in rendered(stripping, [("human", "a"), ("model", "b\n")]).reason
    assert rendered(JinjaFormat(golden_tokenizer, PLAIN, "x"), [("human", "a"), ("model", "b\n")]).reason is None


def test_white_space_that_control_tokens_swallow_is_no_part_of_a_turn(smol_tokenizer):
    """Phi-3's `<|end|>` takes the white space behind it, so a leading newline of a content has no token of its own."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True), AddedToken("<|end|>", lstrip=True, rstrip=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    turns = [("human", "\n a \n"), ("model", "\n\n b \n\n"), ("human", " c"), ("model", "d ")]
    check(tokenizer, rendered(JinjaFormat(tokenizer, tokenizer.chat_template, "x"), turns), turns)


OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ WRITTEN }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + (SERVED) }}{% endif %}"
)
BLOCK, OPEN, CLOSE, HEADER = "<think>\n\n</think>\n\n", "<think>\n", "\n</think>\n\n", "<|channel|>final"
MODEL, SERVING = "the model writes it (supervised)", "serving writes it (not supervised)"


@pytest.mark.parametrize(
    ("written", "served", "openings"),
    [
        ("", "", []),
        (BLOCK, "", [(BLOCK, MODEL)]),
        (BLOCK, BLOCK, [(BLOCK, SERVING)]),
        (HEADER, HEADER, [(HEADER, SERVING)]),
        ("", OPEN, [(CLOSE, MODEL), (OPEN, SERVING)]),
        ("", "<think>", [("</think>", MODEL), ("<think>", SERVING)]),
    ],
)
def test_the_opening_in_front_of_answers_is_named(smol_tokenizer, written, served, openings):
    template = OPENING.replace("WRITTEN", repr(written)).replace("SERVED", repr(served))
    tally = DataTally()
    turns = [("human", "a"), ("model", "b"), ("human", "c"), ("model", "d")]
    tally.add([rendered(JinjaFormat(smol_tokenizer, template, "x"), turns)])
    assert [text for label, text in tally.summary().described() if label == "Opening"] == [
        f"{json.dumps(opening)} in front of 2 answers: {who}" for opening, who in openings
    ]


def test_an_answer_that_is_written_otherwise_later_has_an_example_of_its_own(smol_tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ (m.content if loop.last else m.content.split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = [("human", "a"), ("model", "<think>\nr\n</think>\n\nb"), ("human", "c"), ("model", "d")]
    for history in ("as_served", "as_is"):
        assert (
            rendered(JinjaFormat(smol_tokenizer, template, "x", ChatSettings(history=history)), turns).status == "split"
        )
    whole = Conversation(tuple(Turn(*turn) for turn in turns))
    with pytest.raises(UnrenderableError, match="turn 1 otherwise once other turns follow it"):
        tokenize_conversation(JinjaFormat(smol_tokenizer, template, "x"), whole)


def test_a_template_that_counts_on_the_contents_is_refused_where_it_rewrites_them(smol_tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.replace('damn', '****') }}"
        "<|im_end|>\n{% endfor %}"
    )
    chat_format = JinjaFormat(smol_tokenizer, template, "x")
    check_turns = [("human", "a"), ("model", "fine")]
    assert rendered(chat_format, check_turns).status == "kept"
    with pytest.raises(DataError, match="row 0: the chat template rewrites the text of turn 1"):
        rendered(chat_format, [("human", "a"), ("model", "damn")])


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
        named = rendered(
            JinjaFormat(tokenizer, self.template, "x", ChatSettings(content_tokens=["<think>", "</think>"])), self.turns
        )
        for rendering, count, spelled in ((plain, 1, 1), (named, 1, 1)):
            (example,) = rendering.examples
            assert example.labels.count(think) == example.input_ids.count(think) == count
            assert example.input_ids.count(end) == 2
            assert rendering.spelled == spelled
            assert tokenizer.decode(runs(example.labels)[0][:-1]) == self.turns[1][1]

    def test_without_other_spellings_the_ids_are_exact(self, smol_tokenizer):
        tokenizer = self.tokenizer(smol_tokenizer)
        turns = [("human", "Why?"), self.turns[1]]
        rendering = rendered(
            JinjaFormat(tokenizer, self.template, "x", ChatSettings(content_tokens=["<think>", "</think>"])), turns
        )
        expected = tokenizer.apply_chat_template(messages(turns, merged=False), return_dict=False)
        assert rendering.examples[0].input_ids == expected

    @pytest.mark.parametrize(
        ("token", "reason"), [("<|im_end|>", "is a special token"), ("<reason>", "is no added token of this tokenizer")]
    )
    def test_a_special_or_unknown_token_is_refused(self, smol_tokenizer, token, reason):
        with pytest.raises(ConfigError, match=f"--content_tokens {re.escape(token)}: {reason}"):
            JinjaFormat(self.tokenizer(smol_tokenizer), self.template, "x", ChatSettings(content_tokens=[token]))


def test_conversations_of_many_shapes_do_not_fill_the_memory(smol_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_HELD", 5_000)
    template = ChatTemplate(PlainTextTokenizer(smol_tokenizer), PLAIN, {}, as_is=False)
    for count in range(1, 30):
        (row,) = template.render_all([Conversation((Turn("human", "a"), Turn("model", "b")) * count)])
        assert len(row.contents) == 2 * count
        assert sum(len(text) for text in template._marked.values() if isinstance(text, str)) <= 5_000
