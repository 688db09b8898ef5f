"""Generate answers: render a conversation as in training, yield the text while the model generates it."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from threading import enumerate as threads
from typing import TYPE_CHECKING, Any

from finetune.chat_templates import AnswerDecoder, ChatFormat, UnrenderableError, prompt_ids
from finetune.conversation import Conversation, Turn
from finetune.inference.answer_turns import answer_turn, pieces_to_show, turn_text
from finetune.utils.errors import ConfigError, FinetuneError, first_line

if TYPE_CHECKING:
    import torch

GENERATION_ERRORS = (RuntimeError, ValueError, IndexError)  # out of memory, non-finite logits, an odd model
THREAD_NAME = "generate"
NO_LIMIT = 10**9  # tokenizers without a maximum length give a far larger number
# These replace what generation_config.json sets besides stop tokens: the flags alone decide how to decode.
DECODING_DEFAULTS = {
    "num_beams": 1,
    "top_k": 50,  # no effect in greedy decoding, where transformers warns of any other value
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "use_cache": True,  # configs saved by a run with activation checkpointing turn it off
}
TokenQueue = SimpleQueue[int | BaseException | None]  # ends with None; an exception comes before it


@dataclass(frozen=True)
class SamplingParams:
    """Greedy decoding at temperature 0, else nucleus sampling, of answers of at most `max_new_tokens`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None  # makes sampled answers repeatable; None: a new seed each time
    max_new_tokens: int = 512

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        if not 0 <= self.temperature < math.inf:
            yield f"--temperature {self.temperature:g}: expected 0 (greedy) or more"
        if not 0 < self.top_p <= 1:
            yield f"--top_p {self.top_p:g}: expected more than 0 and at most 1"
        if self.max_new_tokens < 1:
            yield f"--max_new_tokens {self.max_new_tokens}: expected at least 1"

    def generate_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate`."""
        options = {**DECODING_DEFAULTS, "max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return {**options, "do_sample": False, "temperature": 1.0, "top_p": 1.0}
        temperature, top_p = float(self.temperature), float(self.top_p)
        return {**options, "do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


GREEDY = SamplingParams()


@dataclass(frozen=True)
class AnswerGenerator:
    """A loaded model with its chat format and the tokens that end an answer."""

    model: Any
    chat_format: ChatFormat
    stop_token_ids: Sequence[int]

    @property
    def window(self) -> int | None:
        """Maximum number of tokens, prompt and answer together; None if unknown."""
        limits = [
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
            self.chat_format.plain.tokenizer.model_max_length,
        ]
        known = [int(limit) for limit in limits if limit and limit < NO_LIMIT]
        adapters = getattr(self.model, "peft_config", {}).values()
        virtual_tokens = max((getattr(adapter, "num_virtual_tokens", None) or 0 for adapter in adapters), default=0)
        return min(known) - virtual_tokens if known else None

    def prompt(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids before the answer to `turns`, which end with a human turn or the result of a tool."""
        try:
            ids = prompt_ids(self.chat_format, Conversation(tuple(turns), tools=tuple(tools)))
        except UnrenderableError as error:
            raise ConfigError(f"the conversation cannot be rendered: {error}") from None
        if self.window is not None and len(ids) >= self.window:
            raise ConfigError(
                f"the conversation has {len(ids):,} tokens, the model accepts {self.window:,} including the answer: "
                "start a new conversation, or shorten the message"
            )
        return ids

    def answer(self, turns: Sequence[Turn], **options: Any) -> str:
        """Return the answer to `turns` as text; the options are those of `stream`."""
        stream = self.stream(turns, **options)
        for _ in stream:
            pass
        return stream.text

    def stream(
        self,
        turns: Sequence[Turn],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: Sequence[int] = (),
        sampling: SamplingParams = GREEDY,
        **options: Any,
    ) -> AnswerStream:
        """Prepare the answer to `turns`, which end with a human turn or the result of a tool; iterate to generate.

        `tools` are declarations as a `Conversation` has them. `prompt` are the ids before the answer if they are known.
        `options` are arguments of `generate`, which override those of `sampling`.
        """
        ids = [*prompt] or self.prompt(turns, tools)
        options = {**sampling.generate_options(), **options}
        if self.window is not None:
            options["max_new_tokens"] = min(options["max_new_tokens"], self.window - len(ids))
        return AnswerStream(self, Conversation(tuple(turns), tools=tuple(tools)), ids, options, sampling.seed)


def is_generating() -> bool:
    """Whether a model still works on an answer that was abandoned."""
    return any(thread.name == THREAD_NAME for thread in threads())


@dataclass
class AnswerStream:
    """An answer being generated. Iterate to get its text in pieces, without leading and trailing white space.

    Pieces of its reasoning are `ReasoningText`. The model runs in a thread of its own; leaving the loop early, also by
    an exception, stops it.
    """

    generator: AnswerGenerator
    conversation: Conversation
    prompt: list[int]
    options: dict[str, Any]
    seed: int | None
    ids: list[int] = field(default_factory=list)  # generated tokens so far, without the token that ends the turn
    ended: bool = False  # whether the model has ended the turn itself

    @property
    def turn(self) -> Turn:
        """The answer so far, as a training row would hold it; its text is "" if it is empty."""
        return answer_turn(self.generator.chat_format, self.conversation, self.prompt, self.ids)

    @property
    def text(self) -> str:
        """The answer so far as one text, with its reasoning and calls."""
        return turn_text(self.turn)

    def __iter__(self) -> Generator[str, None, None]:
        chat_format = self.generator.chat_format
        pieces = self._pieces(AnswerDecoder(chat_format.plain, self.prompt))
        has_begun, white_space, kind = False, "", str
        for piece in pieces_to_show(pieces, chat_format, self.conversation, self.prompt):
            if type(piece) is not kind:
                if has_begun:
                    yield kind("\n\n")
                has_begun, white_space, kind = False, "", type(piece)
            text = white_space + piece if has_begun else piece.lstrip()
            stripped = text.rstrip()
            white_space = text[len(stripped) :] if has_begun or stripped else ""
            if stripped:
                has_begun = True
                yield kind(stripped)

    def _pieces(self, decoder: AnswerDecoder) -> Iterator[str]:
        stop_token_ids = set(self.generator.stop_token_ids)
        for token in self._tokens():
            if token in stop_token_ids:
                self.ended = True
            else:
                self.ids.append(token)
                yield decoder.add(token)
        yield decoder.rest()

    def _tokens(self) -> Iterator[int]:
        """Yield the generated tokens, the stop token included."""
        queue: TokenQueue = SimpleQueue()
        stop = Event()
        thread = Thread(target=self._generate, args=(queue, stop), name=THREAD_NAME, daemon=True)
        thread.start()
        try:
            while (token := queue.get()) is not None:
                if isinstance(token, GENERATION_ERRORS):
                    raise FinetuneError(f"the model could not answer: {first_line(token)}") from token
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            stop.set()
            thread.join()

    def _generate(self, queue: TokenQueue, stop: Event) -> None:
        import torch
        from transformers import StoppingCriteriaList

        model, stop_token_ids = self.generator.model, list(self.generator.stop_token_ids)
        prompt = torch.tensor([self.prompt], device=model.device)

        def is_stopped(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

        try:
            if self.options["do_sample"]:
                torch.seed() if self.seed is None else torch.manual_seed(self.seed)
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=_QueueStreamer(queue),
                stopping_criteria=StoppingCriteriaList([is_stopped]),
                **{"eos_token_id": stop_token_ids, "pad_token_id": stop_token_ids[0], **self.options},
            )
        except BaseException as error:  # raised in the thread that reads the queue
            queue.put(error)
        queue.put(None)


class _QueueStreamer:
    """A streamer for `generate` that puts new tokens into a queue; the first call delivers the prompt."""

    def __init__(self, queue: TokenQueue) -> None:
        self.queue = queue
        self.is_prompt = True

    def put(self, ids: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in ids.reshape(-1).tolist():
                self.queue.put(token)
        self.is_prompt = False

    def end(self) -> None:
        """Do nothing: `_generate` marks the end, also after an error."""
