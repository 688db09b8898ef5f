"""Plain text for continued pretraining, cut into blocks: every token but the first, and the end, is supervised."""

import unicodedata

from finetune.chat_templates.example import SupervisedSpan, TokenizedConversation, TurnSpan, UnrenderableError
from finetune.chat_templates.plain_text import PlainTextTokenizer


def tokenize_text(plain: PlainTextTokenizer, text: str, max_length: int) -> list[TokenizedConversation]:
    """Tokenize a text to blocks of at most `max_length` tokens; control tokens that it spells stay text.

        blocks of 4   <s> a b c | c d e f | f g </s>      the last token of a block begins the next, as context

    Raises:
        UnrenderableError: the tokenizer has no end token, or does not preserve the text.
    """
    tokenizer = plain.tokenizer
    if tokenizer.eos_token_id is None:
        raise UnrenderableError("the tokenizer has no end-of-sequence token to end a text with")
    (ids,) = plain.encode_all([text])
    decoded = plain.decode_all([ids])[0]
    if unicodedata.normalize("NFKC", decoded).strip() != unicodedata.normalize("NFKC", text).strip():
        raise UnrenderableError("the tokenizer does not preserve the text")
    begins = tokenizer.encode("", add_special_tokens=True)[:1]
    ids = [*(begins if begins == [tokenizer.bos_token_id] else []), *ids, tokenizer.eos_token_id]
    spelled = int(plain.spells_control_token(text))
    blocks = []
    for begin in range(0, max(1, len(ids) - 1), max_length - 1):
        block = ids[begin : begin + max_length]
        tokenized = TokenizedConversation(spelled=spelled)
        tokenized.add(block[:1], supervised=False)
        tokenized.add(block[1:], supervised=True)
        is_last = begin + max_length >= len(ids)
        content = plain.decode_all([block[1:-1] if is_last else block[1:]])[0]
        tokenized.turn_spans.append(TurnSpan(0, "text", 0, len(block)))
        tokenized.supervised_spans.append(SupervisedSpan(0, 1, len(block), content, int(is_last)))
        blocks.append(tokenized)
    return blocks
