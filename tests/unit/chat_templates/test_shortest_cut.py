"""Shortened conversations against their definition, found by trying every possibility."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.chat_templates import (
    IGNORE_INDEX,
    JinjaFormat,
    LingoWhaleFormat,
    Renderer,
    UnrenderableError,
    tokenize_conversation,
)
from finetune.chat_templates.example import SupervisedSpan
from finetune.chat_templates.label_check import _is_text_of, check_labels
from finetune.conversation import Conversation, Turn

# A tail that nobody learns stands behind each turn, as ChatML has it.
TAILED = "{% for m in messages %}{{ '<human>' if m.role == 'user' else '<model>' }}{{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def formats(golden_tokenizer):
    return {
        "lingowhale": LingoWhaleFormat(golden_tokenizer, [3], [4]),
        "tailed": JinjaFormat(golden_tokenizer, TAILED, "tailed"),
    }


def laid_out(chat_format, turns, limit=None):
    """(ids, labels) where all that is learned fits into `limit`, else None."""
    layout = tokenize_conversation(chat_format, Conversation(tuple(turns)))
    last = max((place + 1 for place, label in enumerate(layout.labels) if label != IGNORE_INDEX), default=0)
    if limit is not None and len(layout.input_ids) > limit and not 0 < last <= limit:
        return None
    return layout.input_ids[:limit], layout.labels[:limit]


def cut(chat_format, turns, limit):
    ids, labels = (values[:limit] for values in laid_out(chat_format, turns))
    return (ids, labels) if set(labels) - {IGNORE_INDEX} else None


def alone(turns, last, begin):
    """Turn `last`, learned alone, behind the turns from `begin` on and the system turn."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    context = [Turn(turn.role, turn.text, train=False) for turn in turns[begin:last]]
    return [*system, *context, turns[last]]


def expected(chat_format, turns, limit, windows):
    whole = laid_out(chat_format, turns, limit)
    if whole:
        return "kept", [whole]
    models = [number for number, turn in enumerate(turns) if turn.role == "model"]
    fitting = [number for number in models[:-1] if laid_out(chat_format, turns[: number + 1], limit)]
    found, done = [], 0
    if fitting:
        done = fitting[-1] + 1
        found = [laid_out(chat_format, turns[:done], limit)]
        found = [one for one in found if set(one[1]) - {IGNORE_INDEX}]
    if not windows:
        if not fitting:
            found = [cut(chat_format, turns[: models[0] + 1], limit)]
        found = [one for one in found if one]
        return ("cut" if found else "dropped"), found
    for number in models:
        if number >= done and turns[number].train:
            first = int(turns[0].role == "system")
            begins = [place for place in range(first, number) if turns[place].role == "human"] or [number]
            tried = [laid_out(chat_format, alone(turns, number, place), limit) for place in begins]
            best = next(filter(None, tried), None) or cut(chat_format, alone(turns, number, begins[-1]), limit)
            found += [best] if best else []
    return ("split" if len(found) > 1 else "cut" if found else "dropped"), found


sizes = st.integers(1, 9)
exchanges = st.lists(st.tuples(sizes, sizes, st.booleans()), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(exchanges, sizes, st.sampled_from(["human", "model", "system"]), st.integers(1, 70), st.booleans())
@pytest.mark.parametrize("name", ["lingowhale", "tailed"])
def test_what_is_left_of_a_long_conversation_is_the_best_of_all_possibilities(
    formats, name, pairs, opening, opened_by, limit, windows
):
    turns = [
        turn
        for number, (human, model, train) in enumerate(pairs)
        for turn in (Turn("human", "hijkl"[number] * human), Turn("model", "mnopq"[number] * model, train=train))
    ]
    if opened_by != "human":
        turns = [Turn(opened_by, "s" * opening), *turns]
    if not any(turn.role == "model" and turn.train for turn in turns):
        turns[-1] = Turn("model", turns[-1].text)
    renderer = Renderer(formats[name], limit, too_long="windows" if windows else "turns")
    found = renderer.render(Conversation(tuple(turns), 7, "rows.json", "seven"))
    status, examples = expected(formats[name], turns, limit, windows)
    assert [(one.input_ids, one.labels) for one in found.examples] == examples
    assert found.status == status and ("tokens: " in (found.reason or "")) == (status != "kept")
    assert (found.row, found.id, found.source) == (7, "seven", "rows.json")
    for number, one in enumerate(found.examples):
        assert (one.row, one.source, one.window) == (7, "rows.json", number)
        for span in one.turn_spans:
            assert 0 <= span.start < span.stop <= len(one.input_ids)
            text = renderer.format.plain.decode_all([one.input_ids[span.start : span.stop]])[0]
            text = text.removeprefix("<human>").removeprefix("<model>").removesuffix("</s>")
            joined = f"{turns[0].text}\n\n{turns[span.turn].text}"  # where a system turn stands in front
            assert turns[span.turn].text.startswith(text) or joined.startswith(text)


def test_an_answer_is_known_by_the_number_of_its_turn(formats):
    turns = [Turn("system", "S"), Turn("human", "a"), Turn("model", "b"), Turn("human", "c"), Turn("model", "d")]
    for chat_format in formats.values():
        layout = tokenize_conversation(chat_format, Conversation(tuple(turns)))
        assert [(one.turn, one.text) for one in layout.supervised_spans] == [(2, "b"), (4, "d")]
    with pytest.raises(UnrenderableError, match="there is none"):
        tokenize_conversation(formats["lingowhale"], Conversation(tuple([turns[0], turns[2]])))


def test_turns_keep_their_numbers_where_the_system_turn_is_put_in_front(golden_tokenizer):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    turns = [Turn("system", "S"), Turn("human", "a"), Turn("model", "b"), Turn("human", "c"), Turn("model", "d")]
    for behind in ("</s>", ":"):  # contents between control tokens, and in front of words
        said = f"m.role + m.content + ('{behind}' if m.role == 'user' else '</s>')"
        template = refusing + "{% for m in messages %}{{ " + said + " }}{% endfor %}"
        layout = tokenize_conversation(JinjaFormat(golden_tokenizer, template, "x"), Conversation(tuple(turns)))
        assert [(one.turn, one.text) for one in layout.supervised_spans] == [(2, "b"), (4, "d")]
        assert [(one.turn, one.role) for one in layout.turn_spans] == [(n, turns[n].role) for n in range(1, 5)]


def test_renderers_that_differ_in_anything_are_not_equal(formats, golden_tokenizer):
    plain, tailed = formats["lingowhale"], formats["tailed"]
    renderers = [
        Renderer(plain, 10),
        Renderer(plain, 11),
        Renderer(plain, 10, too_long="windows"),
        Renderer(plain, 10, train_on="last_model_turn"),
        Renderer(tailed, 10),
        Renderer(JinjaFormat(golden_tokenizer, TAILED + " ", "tailed"), 10),
        Renderer(LingoWhaleFormat(golden_tokenizer, [3], [5]), 10),
        Renderer(LingoWhaleFormat(golden_tokenizer, [5], [4]), 10),
    ]
    assert len({str(one.identity()) for one in renderers}) == len(renderers)
    assert Renderer(plain, 10).identity() == renderers[0].identity()


def test_a_layout_that_begins_with_what_is_learned_fails_its_proof(formats):
    layout = tokenize_conversation(formats["lingowhale"], Conversation(tuple([Turn("human", "a"), Turn("model", "b")])))
    layout.labels[0] = layout.input_ids[0]
    assert check_labels(formats["lingowhale"], [layout])[0].startswith("its first token would be supervised")


@pytest.mark.parametrize(
    ("said", "learned", "ended", "same"),
    [
        ("ab", "ab", True, True),
        ("ab", " ab\n", True, True),
        ("ab", "a", True, False),
        ("ab", "a", False, True),
        ("ab", "b", False, False),
        ("a🙂", "a\ufffd", False, True),  # the cut goes through a character
        ("a🙂", "a\ufffd", True, False),
        ("a\ufffd", "a\ufffd", True, True),
        ("ﬁn", "fin", True, True),  # a tokenizer that normalizes
        ("ﬁn", "fi", False, True),
        ("ﬁn", "fa", False, False),
    ],
)
def test_what_is_learned_says_what_the_turn_says(said, learned, ended, same):
    assert _is_text_of(learned, SupervisedSpan(1, 0, 3, said, ended)) is same
