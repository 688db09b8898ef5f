"""A Python-backed tokenizer with the ids of the golden rows; also shipped inside a stand-in model as its own code."""

from transformers import PreTrainedTokenizer


class ByteTokenizer(PreTrainedTokenizer):
    """The id of a byte is 10 + its value; pad 0, eos 2."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, **kwargs):
        kwargs.setdefault("pad_token", "<pad>")
        kwargs.setdefault("eos_token", "</s>")
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return 266

    def get_vocab(self):
        return {**{self.convert_ids_to_tokens(number): number for number in range(266)}, **self.added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return [f"<0x{byte:02X}>" for byte in text.encode("utf-8")]

    def _convert_token_to_id(self, token):
        named = {"<pad>": 0, "</s>": 2}
        return named[token] if token in named else 10 + int(token[3:5], 16)

    def _convert_id_to_token(self, index):
        named = {0: "<pad>", 2: "</s>"}
        return named.get(index) or (f"<0x{index - 10:02X}>" if index >= 10 else f"<unused{index}>")

    def convert_tokens_to_string(self, tokens):
        return bytes(int(token[3:5], 16) for token in tokens if token.startswith("<0x")).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
