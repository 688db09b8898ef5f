"""Where turns are among the ids if no control token stands between them, or an answer is joined with its prompt."""

import copy

import pytest

from finetune.chat_templates import IGNORE_INDEX, JinjaFormat, Renderer
from finetune.conversation import Conversation, Turn

ROLES = {"human": "user", "model": "assistant", "system": "system", "tool": "tool"}
# Only the last answer has an end token.
LAST_ENDS = r"""
{%- for message in messages %}
{{- message.role.upper() + ': ' + message.content }}
{{- eos_token if loop.last and message.role == 'assistant' else '\n' }}
{%- endfor %}
{{- 'ASSISTANT:' if add_generation_prompt }}"""
# White space at the begin of an answer may be joined with the line in front of it.
OPEN_LINE = r"""
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""
TEXTS = ("Hi there", "好的，没问题。\n\nNext", "1", "- a\n- b", "🙂 yes", "x  y", "def f():\n    return 1")


def served(tokenizer, template, turns, **options):
    messages = [{"role": ROLES[turn.role], "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **options)


@pytest.mark.parametrize("name", ["smollm2", "mistral", "deepseek"])
def test_what_is_encoded_grows_with_the_text_however_many_turns_have_no_control_token(
    real_tokenizers, name, monkeypatch
):
    """The ids are those of the whole; each turn's tokens are its text, but for a space in front of it."""
    tokenizer = copy.deepcopy(real_tokenizers[name])
    chat_format = JinjaFormat(tokenizer, LAST_ENDS, "test")
    turns = tuple(
        Turn("human" if number % 2 == 0 else "model", f"{TEXTS[number % 7]} {number}", number == 59)
        for number in range(60)
    )
    lengths, plain = [], chat_format.plain
    for method in ("encode_chats", "encode_all"):
        encode = getattr(plain, method)
        monkeypatch.setattr(
            plain, method, lambda texts, encode=encode: lengths.extend(map(len, texts)) or encode(texts)
        )
    (tokenized,) = chat_format.tokenize_all([Conversation(turns)])

    assert tokenized.input_ids == served(tokenizer, LAST_ENDS, turns)
    text = served(tokenizer, LAST_ENDS, turns, tokenize=False)
    assert len(text) < sum(lengths) < 12 * len(text)
    for span, turn in zip(tokenized.turn_spans, turns, strict=True):
        own = tokenizer.decode(tokenized.input_ids[span.start : span.stop], skip_special_tokens=True)
        assert own.strip() == turn.text, span
    (run,) = tokenized.supervised_spans
    assert tokenized.input_ids[: run.start] == served(tokenizer, LAST_ENDS, turns[:-1], add_generation_prompt=True)


def test_only_an_answer_that_is_joined_with_its_prompt_has_an_example_of_its_own(smol_tokenizer):
    turns = tuple(
        Turn("model" if number % 2 else "human", text)
        for number, text in enumerate(["q", "a", "q", "\n b", "q", "c", "q", "d"])
    )
    rendering = Renderer(JinjaFormat(smol_tokenizer, OPEN_LINE, "test"), 1000).render(Conversation(turns))

    supervised = [
        {span.turn for span in example.turn_spans if IGNORE_INDEX != example.labels[span.stop - 1]}
        for example in rendering.examples
    ]
    assert supervised == [{3}, {1, 5, 7}] and rendering.reason.startswith("2 examples: ")
    for example in rendering.examples:
        for span in example.turn_spans:
            if span.role == "model" and example.labels[span.stop - 1] != IGNORE_INDEX:
                prompt = served(smol_tokenizer, OPEN_LINE, turns[: span.turn], add_generation_prompt=True)
                assert example.input_ids[: span.start] == prompt
