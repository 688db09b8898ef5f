"""Who speaks: the tuned model, or the base it was trained from, each in the format of the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from finetune.conversation import Turn
from finetune.inference.generate import GREEDY, AnswerGenerator, AnswerStream, SamplingParams
from finetune.inference.load_result import BASE, TUNED, LoadedModel


@dataclass
class ChatModels:
    """A result that answers, and its base.

    Attributes:
        names: who speaks, the first one's answers are kept.
        reasons: see `finetune.chat_templates.prompt_ids`.
    """

    opened: LoadedModel
    names: tuple[str, ...] = (TUNED,)
    max_new_tokens: int = 1
    sampling: SamplingParams = GREEDY
    reasons: bool = False

    @contextmanager
    def speaking(self, name: str, turns: Sequence[Turn], *, take: int = 0, **changed: Any) -> Iterator[AnswerStream]:
        """The answer of one of them to `turns`; inside the block it can be iterated.

        Args:
            take: the number of the answer: with a seed, another one is drawn for each, and the same in each session.
            changed: `max_new_tokens` or `sampling`, for this answer.

        Raises:
            ConfigError: the turns cannot be rendered or are too long; the base is not there any more.
        """
        sampling = changed.get("sampling", self.sampling)
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + take)
        tokens = changed.get("max_new_tokens", self.max_new_tokens)
        with self._model(name) as model:
            answerer = AnswerGenerator(model, self.opened.chat_format, self.opened.stop_token_ids, self.reasons)
            yield answerer.stream(turns, max_new_tokens=tokens, sampling=sampling)

    def _model(self, name: str) -> Any:
        return self.opened.base() if name == BASE else nullcontext(self.opened.tuned)

    @property
    def what(self) -> str:
        """Which model it is."""
        result = self.opened.result
        base = result.base["name"]
        if self.names == (BASE,):
            return f"{base}, the base of {result.folder}"
        if result.adapter:
            return f"{result.folder}, {result.adapter.replace('_', ' ').lower()} adapter on {base}"
        return f"{result.folder}, all parameters, trained from {base}" if result.is_trained else str(result.folder)

    @property
    def how(self) -> str:
        """How it answers."""
        warmth = f"temperature {self.sampling.temperature:g}, top_p {self.sampling.top_p:g}"
        way = warmth if self.sampling.temperature else "greedy"
        return f"{way}, at most {self.max_new_tokens:,} tokens an answer"

    @property
    def trained_length(self) -> int | None:
        """Tokens of the longest example that the training saw, by its flags."""
        return self.opened.result.run.get("arguments", {}).get("model_max_length")
