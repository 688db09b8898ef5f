"""Answers from a result: a conversation in, rendered as training did, text out as it is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

from finetune.conversations import Turn
from finetune.errors import ConfigError
from finetune.rendering import ChatFormat, Unrenderable, prompt_ids


@dataclass(frozen=True)
class Answerer:
    """A loaded model, the format its conversations are rendered in, and the tokens that end an answer."""

    model: Any
    chat_format: ChatFormat
    stop_token_ids: Sequence[int]

    def answer(self, turns: Sequence[Turn], *, max_new_tokens: int, **options: Any) -> str:
        """The answer to `turns`, which end with a human turn; greedy unless `options` (of `generate`) say otherwise."""
        return "".join(self.stream(turns, max_new_tokens=max_new_tokens, **options)).strip()

    def stream(self, turns: Sequence[Turn], *, max_new_tokens: int, **options: Any) -> Iterator[str]:
        """The same, piece by piece as the model makes it; control tokens are left out.

        Raises:
            ConfigError: the format cannot express the turns.
        """
        import torch
        from transformers import TextIteratorStreamer

        try:
            ids = prompt_ids(self.chat_format, turns)
        except Unrenderable as refusal:
            raise ConfigError(f"the conversation cannot be rendered: {refusal}") from None
        tokenizer = self.chat_format.plain.tokenizer
        prompt = torch.tensor([ids], device=self.model.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"do_sample": False, **options}
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                self.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(self.stop_token_ids),
                    pad_token_id=self.stop_token_ids[0],
                    streamer=streamer,
                    **options,
                )
            except BaseException as error:  # told where the text is waited for
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]
