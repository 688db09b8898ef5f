"""Conversations that are too long: cut between turns, split into windows, dropped, or an error."""

import pytest

from finetune.chat_templates import CHATML, IGNORE_INDEX, JinjaFormat, LingoWhaleFormat, Renderer
from finetune.chat_templates.example import SupervisedSpan, TokenizedConversation, TurnSpan
from finetune.chat_templates.truncation import first_turn_cut, window_of
from finetune.conversation import BadRow, Conversation, ToolCall, Turn
from tests.helpers.rendered import conversation, learned, render, said


class TestTooLong:
    turns = (("human", "aaaa"), ("model", "bbbb"), ("human", "cccc"), ("model", "dddd"))  # 5+5+5+5+1 tokens

    def rendering(self, tokenizer, max_length):
        return render(LingoWhaleFormat(tokenizer, [3], [4]), *self.turns, max_length=max_length)

    def test_all_fits(self, golden_tokenizer):
        rendering = self.rendering(golden_tokenizer, 21)
        assert (rendering.status, len(rendering.examples[0].input_ids)) == ("kept", 21)

    @pytest.mark.parametrize("max_length", [20, 15, 11])
    def test_complete_leading_turns_are_kept(self, golden_tokenizer, max_length):
        rendering = self.rendering(golden_tokenizer, max_length)
        assert rendering.status == "cut"
        assert golden_tokenizer.decode(learned(rendering.examples[0])) == "bbbb</s>"
        assert rendering.reason == "21 tokens: the first 2 of 4 turns are kept"

    @pytest.mark.parametrize(("max_length", "left"), [(10, "bbbb"), (8, "bb"), (7, "b")])
    def test_the_first_model_turn_is_cut_at_its_end_and_does_not_learn_to_stop(
        self, golden_tokenizer, max_length, left
    ):
        rendering = self.rendering(golden_tokenizer, max_length)
        assert rendering.status == "cut"
        assert golden_tokenizer.decode(learned(rendering.examples[0])) == left
        assert len(rendering.examples[0].input_ids) == max_length
        assert rendering.reason.endswith(f": the first model turn keeps its first {len(left)} tokens, no end of turn")

    @pytest.mark.parametrize("max_length", [1, 5, 6])
    def test_context_that_fills_the_limit_drops_the_row(self, golden_tokenizer, max_length):
        rendering = self.rendering(golden_tokenizer, max_length)
        assert (rendering.status, rendering.examples) == ("dropped", ())
        assert f"alone fills {max_length}" in rendering.reason

    def test_a_tail_that_nobody_learns_costs_no_turn(self, smol_tokenizer):
        chat_format = JinjaFormat(smol_tokenizer, CHATML, "chatml")
        whole = render(chat_format, ("human", "a"), ("model", "b")).examples[0]
        assert whole.labels[-1] == IGNORE_INDEX  # the newline after <|im_end|>
        shorter = render(chat_format, ("human", "a"), ("model", "b"), max_length=len(whole.input_ids) - 1)
        assert shorter.status == "kept"
        assert learned(shorter.examples[0]) == learned(whole)


class TestWindows:
    turns = (
        ("system", "S"),
        *[turn for n in range(6) for turn in (("human", f"h{n}" * 4), ("model", f"m{n}" * 4))],
    )

    def windows(self, tokenizer, max_length, turns=None):
        chat_format = JinjaFormat(tokenizer, CHATML, "chatml")
        return Renderer(chat_format, max_length, too_long="windows").render(conversation(*(turns or self.turns)))

    @pytest.mark.parametrize("max_length", [40, 60, 80, 100, 140])
    def test_each_model_turn_is_learned_once_behind_as_many_turns_as_fit(self, smol_tokenizer, max_length):
        rendering = self.windows(smol_tokenizer, max_length)
        learned_texts = [text for example in rendering.examples for text in said(smol_tokenizer, example)]
        assert learned_texts == [f"m{n}" * 4 + "<|im_end|>" for n in range(6)]
        assert rendering.status == "split"
        assert rendering.reason.endswith(f"{len(rendering.examples)} windows")
        for number, example in enumerate(rendering.examples):
            assert example.window == number
            assert len(example.input_ids) <= max_length
            text = smol_tokenizer.decode(example.input_ids)
            assert text.startswith("<|im_start|>system\nS<|im_end|>\n")
            last = int(said(smol_tokenizer, example)[-1][1])
            assert example.turn_spans[-1].turn == 2 + 2 * last
            assert example.turn_spans[0].turn == 0
            first = next(n for n in range(6) if f"h{n}h" in text)
            if first:  # with one more exchange in front it would not fit
                more = [self.turns[0], *self.turns[1 + 2 * (first - 1) : 3 + 2 * last]]
                longer = render(JinjaFormat(smol_tokenizer, CHATML, "chatml"), *more).examples[0]
                assert longer.labels.index(IGNORE_INDEX) == 0
                assert len(longer.input_ids) - 1 > max_length  # the newline behind the last turn may be left out

    def test_a_turn_longer_than_the_limit_is_cut_and_the_others_are_whole(self, smol_tokenizer):
        turns = (
            ("human", "a"),
            ("model", "b"),
            ("human", "c"),
            ("model", "word " * 100),
            ("human", "d"),
            ("model", "e"),
        )
        rendering = self.windows(smol_tokenizer, 60, turns)
        assert [said(smol_tokenizer, one)[0][:6] for one in rendering.examples] == ["b<|im_", "word w", "e<|im_"]
        assert len(rendering.examples[1].input_ids) == 60
        assert "3 windows; turn 3: it keeps its first" in rendering.reason

    def test_a_turn_whose_context_fills_the_limit_is_left_out_by_name(self, smol_tokenizer):
        turns = (
            ("human", "a"),
            ("model", "b"),
            ("human", "word " * 100),
            ("model", "c"),
            ("human", "d"),
            ("model", "e"),
        )
        rendering = self.windows(smol_tokenizer, 60, turns)
        assert [said(smol_tokenizer, one) for one in rendering.examples] == [["b<|im_end|>"], ["e<|im_end|>"]]
        assert "turn 3 is left out, the context before it alone fills 60" in rendering.reason

    def test_what_fits_is_one_example(self, smol_tokenizer):
        assert self.windows(smol_tokenizer, 10_000).status == "kept"


@pytest.mark.parametrize("options", [{"train": False}, {"train_on": "last_model_turn"}], ids=["marked", "last-only"])
@pytest.mark.parametrize(("too_long", "status"), [("turns", "dropped"), ("windows", "cut")])
def test_leading_turns_that_nobody_learns_are_no_example(golden_tokenizer, too_long, status, options):
    """Such a row is too long, not faulty: it must not stop the run."""
    train_on = options.get("train_on", "model_turns")
    renderer = Renderer(LingoWhaleFormat(golden_tokenizer, [3], [4]), 15, too_long=too_long, train_on=train_on)
    first, second, third, fourth = (Turn(*turn) for turn in TestTooLong.turns)
    turns = (first, Turn("model", second.text, train=options.get("train", True)), third, fourth)
    (outcome,) = renderer.render_all([Conversation(turns, 0, "rows.json")])
    assert outcome.status == status
    if too_long == "turns":
        assert outcome.reason == "21 tokens: no supervised turn fits into 15"
    else:
        assert [said(golden_tokenizer, one) for one in outcome.examples] == [["dddd</s>"]]
        assert outcome.reason == "21 tokens: one window"


@pytest.mark.parametrize(("policy", "status"), [("drop", "dropped"), ("error", None)])
def test_other_policies_for_what_is_too_long(golden_tokenizer, policy, status):
    renderer = Renderer(LingoWhaleFormat(golden_tokenizer, [3], [4]), 20, too_long=policy)
    (outcome,) = renderer.render_all([conversation(*TestTooLong.turns)])
    if status:
        assert (outcome.status, outcome.examples) == (status, ())
        assert outcome.reason == "21 tokens, more than --model_max_length 20"
    else:
        assert isinstance(outcome, BadRow)
        assert outcome.faults == ("rows.json, row 0: 21 tokens, more than --model_max_length 20",)


def in_turns_of(size: int):
    """A format that writes every turn in so many tokens."""

    def tokenize(turns) -> TokenizedConversation:
        tokenized = TokenizedConversation([1] * size * len(turns), [1] * size * len(turns))
        for number, turn in enumerate(turns):
            tokenized.turn_spans.append(TurnSpan(number, turn.role, number * size, (number + 1) * size))
        last = len(turns) - 1
        tokenized.supervised_spans.append(SupervisedSpan(last, last * size, (last + 1) * size, "", 1))
        return tokenized

    return tokenize


@pytest.mark.parametrize(("max_length", "turns_kept"), [(30, 6), (29, 4), (11, 2), (9, 2), (5, 1)])
def test_a_template_that_writes_a_window_shorter_leaves_room_for_more_turns(max_length, turns_kept):
    turns = [Turn(role, "x") for _ in range(3) for role in ("human", "model")]
    window = window_of(turns, 5, in_turns_of(10)(turns), max_length, in_turns_of(5))
    assert window is None if turns_kept == 1 else len(window.turn_spans) == turns_kept


def test_a_turn_that_fits_into_no_window_is_not_tried_behind_every_context():
    turns, tried = [Turn(role, "x") for _ in range(20) for role in ("human", "model")], []

    def tokenize(some):
        tried.append(len(some))
        return in_turns_of(10)(some)

    window = window_of(turns, 39, in_turns_of(1)(turns), 15, tokenize)
    assert len(window.input_ids) == 15 and not window.supervised_spans[0].ended
    assert tried == [14, 2]


def test_half_a_call_is_no_call():
    turns = [Turn("human", "q"), Turn("model", "", tool_calls=(ToolCall("f", {}),))]
    assert first_turn_cut(turns, 15, in_turns_of(10)) is None
    assert first_turn_cut([turns[0], Turn("model", "a")], 15, in_turns_of(10)) is not None
