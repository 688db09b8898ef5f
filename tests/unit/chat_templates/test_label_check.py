"""The proof of labels notices every way in which they can be wrong."""

from finetune.chat_templates import CHATML, IGNORE_INDEX, JinjaFormat, Renderer, tokenize_conversation
from finetune.chat_templates.label_check import check_labels
from finetune.conversation import Conversation, Turn
from tests.helpers.rendered import conversation


class TestTheProof:
    def faulty(self, smol_tokenizer, change):
        chat_format = JinjaFormat(smol_tokenizer, CHATML, "chatml")
        layout = tokenize_conversation(
            chat_format,
            Conversation((Turn("human", "a"), Turn("model", "word for word"), Turn("human", "b"), Turn("model", "c"))),
        )
        assert check_labels(chat_format, [layout]) == [None]
        change(layout)
        return check_labels(chat_format, [layout])[0]

    def test_another_text_is_noticed(self, smol_tokenizer):
        def change(layout):
            layout.labels[layout.supervised_spans[0].start + 1] = smol_tokenizer.encode("x")[0]

        assert "turn 1, character 4" in self.faulty(smol_tokenizer, change)

    def test_a_missing_end_is_noticed(self, smol_tokenizer):
        def change(layout):
            layout.labels[layout.supervised_spans[1].stop - 1] = smol_tokenizer.encode("c")[0]

        assert self.faulty(smol_tokenizer, change) == "turn 3 would not learn to stop"

    def test_a_learned_context_token_is_noticed(self, smol_tokenizer):
        def change(layout):
            place = layout.supervised_spans[1].start - 1
            layout.labels[place] = layout.input_ids[place]

        assert "positions would be supervised" in self.faulty(smol_tokenizer, change)

    def test_a_hole_is_noticed(self, smol_tokenizer):
        def change(layout):
            layout.labels[layout.supervised_spans[0].start] = IGNORE_INDEX

        assert "positions would be supervised" in self.faulty(smol_tokenizer, change)

    def test_a_shift_by_one_is_noticed(self, smol_tokenizer):
        def change(layout):
            layout.labels[:] = [IGNORE_INDEX, *layout.labels[:-1]]

        assert self.faulty(smol_tokenizer, change)

    def test_an_empty_mask_is_noticed(self, smol_tokenizer):
        def change(layout):
            layout.labels[:] = [IGNORE_INDEX] * len(layout.labels)

        assert self.faulty(smol_tokenizer, change) == "nothing in it would be supervised"

    def test_a_character_that_the_tokenizer_cannot_say_is_a_fault_of_the_row(self, smol_tokenizer):
        lost = next(
            character
            for character in map(chr, range(1, 0x3000))
            if character.strip() and smol_tokenizer.decode(smol_tokenizer.encode(character)) != character
        )
        row = conversation(("human", "a"), ("model", f"x{lost}y"), row=7)
        (outcome,) = Renderer(JinjaFormat(smol_tokenizer, CHATML, "chatml"), 1000).render_all([row])
        assert outcome.faults[0].startswith(
            "rows.json, row 7: turn 1, character 1: the tokenizer does not preserve the text"
        )
