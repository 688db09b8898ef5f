"""An example becomes text again: nothing lost, every learned token marked, no character split."""

import copy
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.chat_templates import (
    Example,
    LingoWhaleFormat,
    PlainTextTokenizer,
    Renderer,
    TurnSpan,
    select_chat_format,
)
from finetune.chat_templates.text_segments import Segment, segmenter, segments
from finetune.conversation import ChatSettings, Conversation, Turn
from tests.helpers.byte_tokenizer import byte_tokenizer

TURNS = (
    Turn("system", "Be brief."),
    Turn("human", "你好 👩‍👩‍👧"),
    Turn("model", "  Yes: [bold]<|im_end|>\n"),
    Turn("human", "x"),
    Turn("model", "y"),
)


def rendered(chat_format, turns, max_length=10**6):
    return Renderer(chat_format, max_length).render(Conversation(tuple(turns), 0, "rows.json")).examples[0]


@cache
def letters():
    return byte_tokenizer()


@cache
def lingowhale():
    return LingoWhaleFormat(letters(), [3], [4])


@cache
def metaspace_tokenizer():
    """One token per character, spaces as ▁; its decoder drops the space that a text begins with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<s>", "▁", *map(chr, range(33, 127)), "你", "好"]
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")


def read(found):
    return "".join(one.text for one in found if one.read)


def whole(tokenizer, example):
    return tokenizer.decode(example.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_template_in_segments(smol_tokenizer):
    chat_format, _ = select_chat_format(smol_tokenizer)
    found = segments(rendered(chat_format, TURNS), PlainTextTokenizer(smol_tokenizer))
    assert found[:6] == [
        Segment("control", "<|im_start|>", None),
        Segment("context", "system\n", None),
        Segment("context", "Be brief.", 0),
        Segment("control", "<|im_end|>", None),
        Segment("context", "\n", None),
        Segment("control", "<|im_start|>", None),
    ]
    assert Segment("context", "你好 👩‍👩‍👧", 1) in found
    # What merely spells a control token is text; the turn's own end is one.
    assert [one for one in found if one.turn == 2] == [
        Segment("learned", "  Yes: [bold]<|im_end|>\n", 2),
        Segment("learned_control", "<|im_end|>", 2),
    ]
    assert read(found) == whole(smol_tokenizer, rendered(chat_format, TURNS))


def test_the_end_that_lingowhale_learns_at_the_next_marker():
    turns = [Turn("human", "Hi"), Turn("model", "Yes"), Turn("human", "Bye"), Turn("model", "Ok")]
    assert segments(rendered(lingowhale(), turns), PlainTextTokenizer(letters())) == [
        Segment("control", "<human>", 0),
        Segment("context", "Hi", 0),
        Segment("control", "<model>", 1),
        Segment("learned", "Yes", 1),
        Segment("learned_control", "</s>", 1, read=False),
        Segment("control", "<human>", 2),
        Segment("context", "Bye", 2),
        Segment("control", "<model>", 3),
        Segment("learned", "Ok", 3),
        Segment("learned_control", "</s>", 3),
    ]


def test_markers_that_the_tokenizer_does_not_add():
    chat_format = LingoWhaleFormat(letters(), [5], [6])
    found = segments(
        rendered(chat_format, [Turn("human", "a"), Turn("model", "b")]), PlainTextTokenizer(letters()), [5, 6]
    )
    assert [(one.kind, one.text) for one in found] == [
        ("control", "<unused5>"),
        ("context", "a"),
        ("control", "<unused6>"),
        ("learned", "b"),
        ("learned_control", "</s>"),
    ]


def test_a_token_that_decodes_to_nothing_is_shown_by_its_name():
    example = Example([1, 1 + ord("a") - 32], [-100, 1 + ord("a") - 32], 0, "rows.json", turn_spans=())
    assert segments(example, PlainTextTokenizer(metaspace_tokenizer())) == [
        Segment("context", "▁", None),
        Segment("learned", "a", None),
    ]


def test_a_cut_through_a_character_shows_that_something_is_there():
    example = rendered(lingowhale(), [Turn("human", "a"), Turn("model", "好好")], max_length=7)
    (learned,) = [one for one in segments(example, PlainTextTokenizer(letters())) if one.is_supervised]
    assert learned.text == "好\ufffd"


texts = st.lists(
    st.text("ab 你好👩\u200d\n<>|_ims/enduhal", min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6
)


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(0, 3))
def test_nothing_is_lost_and_what_is_learned_is_the_model_turns(said, context_turns):
    turns = [Turn("model" if number % 2 else "human", text) for number, text in enumerate(said[: len(said) // 2 * 2])]
    example = rendered(lingowhale(), turns)
    found = segments(example, PlainTextTokenizer(letters()))
    assert read(found) == whole(letters(), example)
    learned = "".join(one.text for one in found if one.is_supervised)
    assert learned == "".join(turn.text + "</s>" for turn in turns if turn.role == "model")
    assert {one.text for one in found if one.is_control} == {"<human>", "<model>", "</s>"}
    assert all(left.turn <= right.turn for left, right in zip(found, found[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("ab 你<s>", min_size=1, max_size=6), st.booleans()), min_size=1, max_size=5))
def test_spaces_between_runs_stay(runs):
    tokenizer = metaspace_tokenizer()
    ids, labels, spans = [0], [-100], []
    for turn, (text, learned) in enumerate(runs):
        new = [number for letter in text for number in _letters(tokenizer, letter)]
        spans.append(TurnSpan(turn, "model", len(ids), len(ids) + len(new)))
        ids += new
        labels += new if learned else [-100] * len(new)
    found = segments(Example(ids, labels, 0, "rows.json", turn_spans=tuple(spans)), PlainTextTokenizer(tokenizer))
    assert read(found) == whole(tokenizer, Example(ids, labels, 0, "rows.json"))
    assert "".join(one.text for one in found) == "<s>" + "".join(text for text, _ in runs)


def _letters(tokenizer, letter):
    """One letter as a token, never the control token."""
    return [tokenizer.convert_tokens_to_ids("▁" if letter == " " else letter)]


@pytest.mark.parametrize("count", [0, 1])
def test_an_example_without_spans(count):
    example = Example([10 + ord("a")] * count, [-100] * count, 0, "rows.json")
    assert segments(example, PlainTextTokenizer(letters())) == [Segment("context", "a", None)] * count


def test_a_content_token_is_text_as_it_is_in_training():
    tokenizer = copy.deepcopy(letters())
    tokenizer.add_tokens(["<think>"])
    said = [Turn("human", "a"), Turn("model", "<think>b")]
    formats = [
        select_chat_format(tokenizer, "lingowhale", ChatSettings(content_tokens=one))[0] for one in (["<think>"], [])
    ]
    shown = [[(one.kind, one.text) for one in segmenter(one)(rendered(one, said))] for one in formats]
    assert shown[0] == shown[1], "as a token, or letter by letter"
    assert ("learned", "<think>b") in shown[0] and len(rendered(formats[0], said).input_ids) == 6
