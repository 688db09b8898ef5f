"""Text that can never become a control token, and control tokens that no text becomes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.chat_templates.labels import UnrenderableError
from finetune.utils.errors import ConfigError


class PlainTextTokenizer:
    """Encodes text so that no substring of it becomes a control token, and decodes what was learned.

    A tokenizer with a Rust backend is told to read special tokens as text, or, where it has added tokens of another
    kind, copied without them; a Python-backed one is asked to split them.
    Either way the result is checked: a control token among the ids raises `UnrenderableError`. The added tokens in
    `content_tokens` stay usable inside texts, such as the `<think>` of reasoning models.

    Raises:
        ConfigError: a content token that the tokenizer does not have, or that is a special token to it.
    """

    def __init__(self, tokenizer: Any, content_tokens: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.content_tokens = tuple(content_tokens)
        allowed = {_content_token_id(tokenizer, token) for token in content_tokens}
        self.added = {
            number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if number not in allowed
        }
        # A blank added token (runs of spaces, a newline) controls nothing.
        self.control_ids = frozenset(
            number for number in {*self.added, *tokenizer.all_special_ids} if self._token(number).strip()
        )
        self.control_texts = tuple(token for token in self.added.values() if token.strip())
        self._first_letters = tuple({token[0] for token in self.control_texts})

    def _token(self, number: int) -> str:
        return self.added.get(number) or str(self.tokenizer.convert_ids_to_tokens(number))

    @cached_property
    def _backend(self) -> Any:
        return _copied(self.tokenizer.backend_tokenizer, added_tokens=self.content_tokens)

    @cached_property
    def _bytes(self) -> _TokenBytes | None:
        """The bytes of each token, where a text is nothing but those: several times as fast as decoding."""
        decoder = self.tokenizer.backend_tokenizer.decoder if self.tokenizer.is_fast else None
        is_byte_level = decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"
        return _TokenBytes(self.tokenizer) if is_byte_level else None

    def identity(self) -> str:
        """A digest of all that the tokenizer encodes with, its own code included where it has some."""
        digest = hashlib.blake2b(digest_size=16)
        kind = type(self.tokenizer)
        if self.tokenizer.is_fast:
            backend = self.tokenizer.backend_tokenizer
            stored = Path(self.tokenizer.name_or_path or os.devnull) / "tokenizer.json"
            # The vocabulary is the file's; what a program may have set since is asked of the object.
            digest.update(stored.read_bytes() if stored.is_file() else backend.to_str().encode())
            parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
            digest.update(repr([part and part.__getstate__() for part in parts]).encode())
            digest.update(repr(sorted(self.tokenizer.added_tokens_decoder.items())).encode())
        else:
            digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
            digest.update(Path(inspect.getfile(kind)).read_bytes())
            digest.update(repr(sorted(self.tokenizer.init_kwargs.items(), key=str)).encode())
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        digest.update(json.dumps([kind.__qualname__, special, self.content_tokens], sort_keys=True).encode())
        return digest.hexdigest()

    def spells_control_token(self, text: str) -> bool:
        """Whether the text holds the spelling of an added token."""
        if not any(letter in text for letter in self._first_letters):
            return False
        return any(token in text for token in self.control_texts)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; decoding them gives the text back, control spellings included."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text.

        Raises:
            Unrenderable: a control token that this tokenizer cannot encode as text.
        """
        if self.tokenizer.is_fast:
            encoded = [one.ids for one in self._encoded(list(texts))]
        else:
            encoded = [
                list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) for text in texts
            ]
        for text, ids in zip(texts, encoded, strict=True):
            smuggled = self.control_ids.intersection(ids) - {self.tokenizer.unk_token_id}
            if smuggled and self.spells_control_token(text):
                raise UnrenderableError(
                    f"a turn spells the control token {self._token(min(smuggled))!r} and this tokenizer cannot encode "
                    "it as text"
                )
        return encoded

    def _encoded(self, texts: list[str]) -> list[Any]:
        shared = self.tokenizer.backend_tokenizer
        has_others = not all(token.special for token in self.tokenizer.added_tokens_decoder.values())
        if has_others or shared.truncation or shared.padding:
            return self._backend.encode_batch(texts, add_special_tokens=False)
        shared.encode_special_tokens = True
        try:
            return shared.encode_batch(texts, add_special_tokens=False)
        finally:
            shared.encode_special_tokens = False

    def decode_all(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """The text that each list of ids spells, control tokens by their spelling, nothing tidied."""
        if self._bytes is not None:
            return [b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", "replace") for ids in answers]
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.decode_batch(answers, skip_special_tokens=False)
        return [
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in answers
        ]


class _TokenBytes(dict):
    """id -> bytes, for vocabularies that write each byte as one letter (GPT-2's `bytes_to_unicode`).

    A printable byte of Latin-1 is its own letter; the others follow in order from U+0100.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {chr(byte): byte for byte in printable}
        self.letters |= {chr(0x100 + place): byte for place, byte in enumerate(others)}
        self.token = tokenizer.backend_tokenizer.id_to_token

    def __missing__(self, number: int) -> bytes:
        token = self.token(number)
        whole = all(letter in self.letters for letter in token)
        self[number] = bytes(map(self.letters.__getitem__, token)) if whole else token.encode("utf-8")
        return self[number]


def with_plain_offsets(backend: Any) -> Any:
    """The Rust tokenizer, or a copy, that adds, cuts and pads nothing and whose offsets include leading spaces."""
    processor = backend.post_processor
    trims = processor is not None and b'"trim_offsets":true' in processor.__getstate__()
    return _copied(backend) if trims or backend.truncation or backend.padding else backend


def _copied(backend: Any, added_tokens: Sequence[str] | None = None) -> Any:
    """Of the added tokens all, or only those named."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state.update(post_processor=None, truncation=None, padding=None)
    if added_tokens is not None:
        state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] in added_tokens]
    return Tokenizer.from_str(json.dumps(state))


def _content_token_id(tokenizer: Any, token: str) -> int:
    for number, added in tokenizer.added_tokens_decoder.items():
        if str(added) == token:
            if added.special or number in tokenizer.all_special_ids:
                raise ConfigError(f"--content_tokens {token}: is a special token: no text may use it")
            return number
    raise ConfigError(f"--content_tokens {token}: is no added token of this tokenizer, so it is plain text already")


def add_control_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens that no text is ever split into; their ids lie beyond all others.

    Raises:
        ConfigError: the tokenizer's ids have gaps, so that a new token would get an id that is taken.
    """
    taken = {number: token for token, number in tokenizer.get_vocab().items()}
    tokenizer.add_tokens([token for token in tokens if token not in taken.values()], special_tokens=True)
    for token in tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        if taken.get(number, token) != token:
            raise ConfigError(
                f"the token {token!r} cannot be added: this tokenizer gives it the id of {taken[number]!r}"
            )
