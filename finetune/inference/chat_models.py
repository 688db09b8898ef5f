"""The models that answer in a chat: the tuned model, its base, or both."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from finetune.conversation import Turn
from finetune.inference.generate import GREEDY, AnswerGenerator, AnswerStream, SamplingParams
from finetune.inference.load_result import BASE, TUNED, LoadedModel


@dataclass
class ChatModels:
    """A loaded result, and which of its two models answer."""

    loaded: LoadedModel
    names: tuple[str, ...] = (TUNED,)  # models that answer; the answers of the first are kept in the conversation
    sampling: SamplingParams = GREEDY

    @contextmanager
    def stream(
        self,
        name: str,
        turns: Sequence[Turn],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        attempt: int = 0,
        sampling: SamplingParams | None = None,
    ) -> Iterator[AnswerStream]:
        """Yield the answer of the model `name` to `turns`, to be iterated inside the block.

        Args:
            tools: Declarations as a `Conversation` has them.
            attempt: Number of the answer in this session. It is added to the seed, so that a retry samples another
                answer, and the same one in each session.
            sampling: For this answer; default: that of the chat.
        """
        sampling = sampling or self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + attempt)
        loaded = self.loaded
        with loaded.base() if name == BASE else nullcontext(loaded.tuned) as model:
            generator = AnswerGenerator(model, loaded.chat_format, loaded.stop_token_ids)
            yield generator.stream(turns, tools=tools, sampling=sampling)

    @property
    def model_description(self) -> str:
        """Which model answers."""
        result = self.loaded.result
        base = result.base["name"]
        if self.names == (BASE,):
            return f"{base}, the base of {result.folder}"
        if result.adapter:
            return f"{result.folder}, {result.adapter.replace('_', ' ').lower()} adapter on {base}"
        return f"{result.folder}, all parameters, trained from {base}" if result.is_trained else str(result.folder)

    @property
    def decoding_description(self) -> str:
        """How answers are generated."""
        temperature, top_p = self.sampling.temperature, self.sampling.top_p
        method = f"temperature {temperature:g}, top_p {top_p:g}" if temperature else "greedy"
        return f"{method}, at most {self.sampling.max_new_tokens:,} tokens per answer"
