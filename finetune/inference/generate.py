"""Answers from a result: a conversation in, rendered as training did, text out as it is made."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from threading import enumerate as threads
from typing import Any

from finetune.chat_templates import AnswerDecoder, ChatFormat, UnrenderableError, answer_text, prompt_ids
from finetune.conversation import Turn
from finetune.utils.errors import ConfigError, FinetuneError, first_line

REFUSALS = (RuntimeError, ValueError, IndexError)  # out of memory, numbers that are not finite, an odd model
WORKER = "answering"
NO_LIMIT = 10**9  # what tokenizers without a limit of their own give as one is far larger
# The flags decide alone: what a model's generation_config.json proposes beside its stop tokens does not count.
PLAIN_DECODING = {
    "num_beams": 1,
    "top_k": 50,  # without meaning in greedy decoding, where transformers warns of any other number
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "use_cache": True,  # a config saved by a run with activation checkpointing says no
}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen: greedily at temperature 0, else drawn, from the likeliest that make up `top_p`.

    Attributes:
        seed: makes drawn answers repeatable; None: another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """The same for `generate`."""
        if self.temperature == 0:
            return {**PLAIN_DECODING, "do_sample": False, "temperature": 1.0, "top_p": 1.0}
        drawn = {"do_sample": True, "temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": 0}
        return {**PLAIN_DECODING, **drawn}


GREEDY = SamplingParams()


@dataclass(frozen=True)
class AnswerGenerator:
    """A loaded model, the format its conversations are rendered in, and the tokens that end an answer.

    Attributes:
        reasons: whether its answers begin with their reasoning; see `prompt_ids`.
    """

    model: Any
    chat_format: ChatFormat
    stop_token_ids: Sequence[int]
    reasons: bool = False

    @property
    def window(self) -> int | None:
        """The most tokens that the model reads, prompt and answer together; None where nothing says so."""
        limits = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        limits.append(self.chat_format.plain.tokenizer.model_max_length)
        known = [int(one) for one in limits if one and one < NO_LIMIT]
        adapters = getattr(self.model, "peft_config", {}).values()
        virtual = max((getattr(one, "num_virtual_tokens", None) or 0 for one in adapters), default=0)
        return min(known) - virtual if known else None

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids in front of the answer to `turns`, which end with a human turn.

        Raises:
            ConfigError: the format cannot express the turns, or they leave no room for an answer.
        """
        try:
            ids = prompt_ids(self.chat_format, turns, reasons=self.reasons)
        except UnrenderableError as refusal:
            raise ConfigError(f"the conversation cannot be rendered: {refusal}") from None
        window = self.window
        if window is not None and len(ids) >= window:
            raise ConfigError(
                f"the conversation has {len(ids):,} tokens and the model reads {window:,}, its answer included: "
                "begin a new one, or say it shorter"
            )
        return ids

    def answer(
        self, turns: Sequence[Turn], *, max_new_tokens: int, sampling: SamplingParams = GREEDY, **options: Any
    ) -> str:
        """The answer to `turns`, which end with a human turn; greedy unless `sampling` or `options` say otherwise."""
        return "".join(self.stream(turns, max_new_tokens=max_new_tokens, sampling=sampling, **options))

    def stream(
        self, turns: Sequence[Turn], *, max_new_tokens: int, sampling: SamplingParams = GREEDY, **options: Any
    ) -> AnswerStream:
        """The same, piece by piece as the model makes it.

        Args:
            options: of `generate`; they go over those of `sampling`.

        Raises:
            ConfigError: the format cannot express the turns, or they leave no room for an answer.
        """
        prompt = self.prompt(turns)
        room = max_new_tokens if self.window is None else min(max_new_tokens, self.window - len(prompt))
        options = {**sampling.options(), "max_new_tokens": room, **options}
        return AnswerStream(self, tuple(turns), prompt, options, sampling.seed)


def is_busy() -> bool:
    """Whether a model still works on an answer that nobody waits for any more."""
    return any(thread.name == WORKER for thread in threads())


@dataclass
class AnswerStream:
    """An answer on its way. Iterating gives its text, piece by piece, without white space at its ends.

    The model works in a thread of its own; leaving the loop early, by an exception too, stops it.

    Attributes:
        ids: what the model has said so far, without the token that ends the turn.
        ended: whether the model has ended the turn itself.
    """

    answerer: AnswerGenerator
    turns: tuple[Turn, ...]
    prompt: list[int]
    options: dict[str, Any]
    seed: int | None
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def text(self) -> str:
        """What has been said, as a training row would hold it; "" where nothing was."""
        return answer_text(self.answerer.chat_format, self.turns, self.prompt, self.ids)

    def __iter__(self) -> Generator[str, None, None]:
        spelling = AnswerDecoder(self.answerer.chat_format.plain, self.prompt)
        begun, blank = False, ""
        for piece in self._pieces(spelling):
            piece = blank + piece if begun else piece.lstrip()
            shown = piece.rstrip()
            blank = piece[len(shown) :] if begun or shown else ""
            if shown:
                begun = True
                yield shown

    def _pieces(self, spelling: AnswerDecoder) -> Iterator[str]:
        stops = set(self.answerer.stop_token_ids)
        for token in self._tokens():
            if token in stops:
                self.ended = True
            else:
                self.ids.append(token)
                yield spelling.add(token)
        yield spelling.rest()

    def _tokens(self) -> Iterator[int]:
        """What the model says, the stop token included, while it goes on."""
        said: SimpleQueue[int | BaseException | None] = SimpleQueue()
        leave = Event()
        worker = Thread(target=self._generate, args=(said, leave), name=WORKER, daemon=True)
        worker.start()
        try:
            while (token := said.get()) is not None:
                if isinstance(token, REFUSALS):
                    raise FinetuneError(f"the model could not answer: {first_line(token)}") from token
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            leave.set()
            worker.join()

    def _generate(self, said: SimpleQueue[int | BaseException | None], leave: Event) -> None:
        import torch
        from transformers import StoppingCriteriaList

        model, stops = self.answerer.model, list(self.answerer.stop_token_ids)
        prompt = torch.tensor([self.prompt], device=model.device)

        def must_leave(input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((input_ids.shape[0],), leave.is_set(), device=input_ids.device)

        try:
            if self.options["do_sample"]:
                torch.seed() if self.seed is None else torch.manual_seed(self.seed)
            options = {"eos_token_id": stops, "pad_token_id": stops[0], **self.options}
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=_Told(said),
                stopping_criteria=StoppingCriteriaList([must_leave]),
                **options,
            )
        except BaseException as error:  # raised where the answer is waited for
            said.put(error)
        said.put(None)


class _Told:
    """What `generate` calls a streamer: the prompt comes first and is known."""

    def __init__(self, said: SimpleQueue[int | BaseException | None]) -> None:
        self.said = said
        self.is_prompt = True

    def put(self, ids: Any) -> None:
        if not self.is_prompt:
            for token in ids.reshape(-1).tolist():
                self.said.put(token)
        self.is_prompt = False

    def end(self) -> None:
        """`_generate` says itself that all is said."""
