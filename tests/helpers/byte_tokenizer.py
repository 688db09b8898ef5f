"""A tokenizer of 266 ids: one per byte, and the control tokens of the LingoWhale format."""

CONTROL_TOKENS = {"<pad>": 0, "</s>": 2, "<human>": 3, "<model>": 4}


def byte_tokenizer():
    """The id of a byte is 10 + its value; pad 0, eos 2, the human marker 3, the model marker 4."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet(), key=_byte_of)
    unused = {f"<unused{number}>": number for number in (1, 5, 6, 7, 8, 9)}
    vocabulary = {**CONTROL_TOKENS, **unused, **{letter: 10 + number for number, letter in enumerate(letters)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def _byte_of(letter: str) -> int:
    """The byte that a letter of the byte-level alphabet stands for: itself if printable, else in order from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return ord(letter) if ord(letter) < 256 else others[ord(letter) - 256]
