"""Text that can never become a control token, and control tokens that no text becomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from finetune.errors import ConfigError
from finetune.rendering.examples import Unrenderable


class PlainText:
    """Encodes text so that no substring of it becomes a control token.

    A tokenizer with a Rust backend is copied without its added tokens; a Python-backed one is asked to split them.
    Either way the result is checked: an added token among the ids raises `Unrenderable`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added_ids = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)
        self.added_texts = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip())

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        return Tokenizer.from_str(json.dumps(state))

    def spells_control_token(self, text: str) -> bool:
        """Whether the text holds the spelling of an added token."""
        return any(token in text for token in self.added_texts)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; decoding them gives the text back, control spellings included."""
        if self.tokenizer.is_fast:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        smuggled = self.added_ids.intersection(ids) - {self.tokenizer.unk_token_id}
        if smuggled and self.spells_control_token(text):
            raise Unrenderable(
                "a turn spells the control token "
                f"{self.tokenizer.convert_ids_to_tokens(min(smuggled))!r} and this tokenizer cannot encode it as text"
            )
        return list(ids)


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
