"""Encode contents as plain text, so that no text becomes a control token."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.utils.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class UnrenderableError(Exception):
    """The format cannot express this conversation; the message is the reason alone."""


class PlainTextTokenizer:
    """Encodes text so that no substring of it becomes a control token, and decodes labels.

    A tokenizer with a Rust backend encodes special tokens as text; if it has added tokens that are not special, a copy
    without its added tokens is used. A Python-backed one splits them. In all cases the result is checked: a control
    token among the ids raises `UnrenderableError`. The added tokens in `content_tokens` stay usable inside texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, content_tokens: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.content_tokens = tuple(content_tokens)
        allowed = {_content_token_id(tokenizer, token) for token in content_tokens}
        self.added = {
            token_id: str(token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token_id not in allowed
        }
        # A blank added token (runs of spaces, a newline) controls nothing.
        self.control_ids = frozenset(
            token_id for token_id in {*self.added, *tokenizer.all_special_ids} if self.token(token_id).strip()
        )
        self.control_texts = tuple(token for token in self.added.values() if token.strip())
        self._first_letters = tuple({token[0] for token in self.control_texts})

    @cached_property
    def for_answers(self) -> PlainTextTokenizer:
        """The encoder of model turns: added tokens that are not special, such as `<think>`, stay tokens in them."""
        own = [
            str(token)
            for token_id, token in self.tokenizer.added_tokens_decoder.items()
            if not token.special and str(token).strip() and token_id not in self.tokenizer.all_special_ids
        ]
        tokens = tuple(dict.fromkeys([*self.content_tokens, *own]))
        return PlainTextTokenizer(self.tokenizer, tokens) if tokens != self.content_tokens else self

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches the text of a control token, the longest first."""
        texts = sorted({self.token(token_id) for token_id in self.control_ids}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def token(self, token_id: int) -> str:
        return self.added.get(token_id) or str(self.tokenizer.convert_ids_to_tokens(token_id))

    @cached_property
    def _backend(self) -> Any:
        return _copy(self.tokenizer.backend_tokenizer, added_tokens=self.content_tokens)

    @cached_property
    def _bytes(self) -> _TokenBytes | None:
        """The bytes of each token of a byte-level vocabulary: joining them is several times as fast as decoding."""
        decoder = self.tokenizer.backend_tokenizer.decoder if self.tokenizer.is_fast else None
        is_byte_level = decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"
        return _TokenBytes(self.tokenizer) if is_byte_level else None

    def identity(self) -> str:
        """A digest of everything that the tokenizer encodes with, including its own code if it has some."""
        digest = hashlib.blake2b(digest_size=16)
        kind = type(self.tokenizer)
        if self.tokenizer.is_fast:
            backend = self.tokenizer.backend_tokenizer
            stored = Path(self.tokenizer.name_or_path or os.devnull) / "tokenizer.json"
            # The vocabulary comes from the file; what a program may have changed since comes from the object.
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
        """Whether the text contains the spelling of a control token."""
        for letter in self._first_letters:
            if letter in text:
                return any(token in text for token in self.control_texts)
        return False

    def encode(self, text: str) -> list[int]:
        """Encode `text`; decoding gives the text back, control spellings included."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text.

        Raises:
            UnrenderableError: a control token that this tokenizer cannot encode as text.
        """
        if self.tokenizer.is_fast:
            encoded = [encoding.ids for encoding in self._encode_batch(list(texts))]
        else:
            encoded = [
                list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) for text in texts
            ]
        for text, ids in zip(texts, encoded, strict=True):
            leaked = self.control_ids.intersection(ids) - {self.tokenizer.unk_token_id}
            if leaked and self.spells_control_token(text):
                raise UnrenderableError(
                    f"a turn spells the control token {self.token(min(leaked))!r} and this tokenizer cannot encode "
                    "it as text"
                )
        return encoded

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        backend = self.tokenizer.backend_tokenizer
        has_others = not all(token.special for token in self.tokenizer.added_tokens_decoder.values())
        if has_others or backend.truncation or backend.padding:
            return self._backend.encode_batch(texts, add_special_tokens=False)
        backend.encode_special_tokens = True
        try:
            return backend.encode_batch(texts, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False

    def encode_chats(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text; the control tokens that it spells are tokens."""
        if not self.tokenizer.is_fast:
            return [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        encodings = self._chat_backend.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [encoding.ids for encoding in encodings]

    @cached_property
    def _chat_backend(self) -> Any:
        backend = self.tokenizer.backend_tokenizer
        return _copy(backend) if backend.truncation or backend.padding else backend

    def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Decode each sequence of ids, control tokens to their spelling, without any cleaning up."""
        if self._bytes is not None:
            return [b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", "replace") for ids in sequences]
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=False)
        return [self.decode(ids) for ids in sequences]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode one sequence of ids with the tokenizer's own method, without any cleaning up."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _TokenBytes(dict[int, bytes]):
    """id -> bytes, for vocabularies that write each byte as one letter (GPT-2's `bytes_to_unicode`).

    A printable byte of Latin-1 is its own letter; the others follow in order from U+0100.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {chr(byte): byte for byte in printable}
        self.letters |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
        self.token = tokenizer.backend_tokenizer.id_to_token

    def __missing__(self, token_id: int) -> bytes:
        token = self.token(token_id)
        is_bytes = all(letter in self.letters for letter in token)
        self[token_id] = bytes(map(self.letters.__getitem__, token)) if is_bytes else token.encode("utf-8")
        return self[token_id]


def _copy(backend: Any, added_tokens: Sequence[str] | None = None) -> Any:
    """A copy that does not truncate, pad or post-process, with all added tokens or only those named."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state.update(post_processor=None, truncation=None, padding=None)
    if added_tokens is not None:
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in added_tokens]
    return Tokenizer.from_str(json.dumps(state))


def _content_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    for token_id, added in tokenizer.added_tokens_decoder.items():
        if str(added) == token:
            if added.special or token_id in tokenizer.all_special_ids:
                raise ConfigError(f"--content_tokens {token}: is a special token: no text may use it")
            return token_id
    raise ConfigError(f"--content_tokens {token}: is no added token of this tokenizer, so it is plain text already")


def add_control_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens that no text is encoded to; their ids follow all others."""
    taken = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokenizer.add_tokens([token for token in tokens if token not in taken.values()], special_tokens=True)
    for token in tokens:
        token_id: Any = tokenizer.convert_tokens_to_ids(token)
        if taken.get(token_id, token) != token:
            raise ConfigError(
                f"the token {token!r} cannot be added: this tokenizer gives it the id of {taken[token_id]!r}"
            )
