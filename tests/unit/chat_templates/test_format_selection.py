"""What a chat format cannot do is said when it is chosen."""

from types import SimpleNamespace

import pytest

from finetune.chat_templates import LingoWhaleFormat, UnrenderableError, select_chat_format
from finetune.chat_templates.raw_text import tokenize_text
from finetune.conversation import ChatSettings
from finetune.utils.errors import ConfigError

WITHOUT_END = SimpleNamespace(eos_token_id=None)


@pytest.mark.parametrize("options", [{"template_kwargs": {"enable_thinking": True}}, {"reasoning": "context"}])
def test_options_of_jinja_templates_need_one(options, golden_tokenizer):
    with pytest.raises(ConfigError, match="--chat_template lingowhale: --chat_template_kwargs and --reasoning context"):
        select_chat_format(golden_tokenizer, "lingowhale", ChatSettings(**options))


def test_a_tokenizer_without_an_end_token_ends_neither_a_turn_nor_a_text():
    with pytest.raises(ConfigError, match="no end-of-sequence token to end a turn with"):
        LingoWhaleFormat(WITHOUT_END, [3], [4])
    with pytest.raises(UnrenderableError, match="no end-of-sequence token to end a text with"):
        tokenize_text(SimpleNamespace(tokenizer=WITHOUT_END), "a", 8)


def test_a_text_that_the_tokenizer_changes_is_no_example():
    plain = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=0), encode_all=lambda _: [[1]], decode_all=lambda _: ["<unk>"]
    )
    with pytest.raises(UnrenderableError, match="the tokenizer does not preserve the text"):
        tokenize_text(plain, "河", 8)
