"""What the base answers to a few prompts, and what the result does; made once, kept as `answers.json`.

Greedy, as `generation` answers. The prompts are the first human turns of the rows in `samples.json`, with what the data
answers beside them, or those of a file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.conversation import Turn
from finetune.inference.generate import AnswerGenerator
from finetune.inference.load_result import MEMORY_FRACTION, LoadedModel, free_memory, load_for_inference
from finetune.inference.run_result import RunResult
from finetune.models.loader import torch_dtype
from finetune.run_dir.data_samples import RowSample
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError, FinetuneError, first_line

ANSWERS_FILE = "answers.json"
NEW_TOKENS = 96
LOADING_SHARE, BYTES_A_SECOND = 0.6, 1e9  # of the time, for loading; what a warm disk gives at least
LEAST_SECONDS = 0.5


@dataclass(frozen=True)
class SamplePrompt:
    """Turns that wait for an answer, and what the data answers (None where that is not known)."""

    turns: tuple[Turn, ...]
    expected: str | None = None


@dataclass(frozen=True)
class PromptAnswers:
    """A prompt, the base's answer and the result's; `hurried`: time ended an answer, and not the model or its limit."""

    prompt: SamplePrompt
    before: str
    after: str
    hurried: bool = False


@dataclass(frozen=True)
class SampleAnswers:
    """All prompts of a run that were answered, each answer of at most `new_tokens` tokens."""

    new_tokens: int
    answered: tuple[PromptAnswers, ...]
    prompts_file: str | None = None


def prompts_of(cards: Sequence[RowSample], count: int) -> list[SamplePrompt]:
    """The first human turns, behind a system turn, of the first `count` rows that were kept whole; none comes twice."""
    found: dict[tuple[Turn, ...], SamplePrompt] = {}
    for card in cards:
        turns = [(turn.role, turn.text) for example in card.examples[:1] for turn in example if turn.role]
        roles = [role for role, _ in turns]
        first = roles.index("human") if "human" in roles else None
        if card.status != "kept" or card.unshown or first not in (0, 1) or (first == 1 and roles[0] != "system"):
            continue
        asked = tuple(Turn(role, text) for role, text in turns[: first + 1])
        follows = turns[first + 1 : first + 2]
        if asked[-1].text.strip() and len(found) < count:
            found.setdefault(
                asked, SamplePrompt(asked, follows[0][1] if follows and follows[0][0] == "model" else None)
            )
    return list(found.values())


def read_prompts(path: Path) -> list[SamplePrompt]:
    """Prompts of a file: one a line, or a JSON array of texts or of objects with a `question`.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    values: Any = text.split("\n")
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--prompts {path}, line {error.lineno}: not JSON: {error.msg}") from None
    listed = values if isinstance(values, list) else [None]
    texts = [one.get("question") if isinstance(one, dict) else one for one in listed if one != ""]
    if not all(isinstance(one, str) for one in texts):
        raise ConfigError(f'--prompts {path}: expected an array of texts, or of objects with a "question"')
    prompts = [SamplePrompt((Turn("human", one.strip()),)) for one in texts if one.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path}: holds no prompt: write one a line")
    return prompts


def read_answers(folder: Path, run: dict[str, Any]) -> SampleAnswers | None:
    """The answers that were kept; None where there are none, or those of another run or state of it."""
    try:
        values = json.loads((folder / ANSWERS_FILE).read_text(encoding="utf-8"))
        if values["of"] != _of(run):
            return None
        answered = tuple(
            PromptAnswers(
                SamplePrompt(
                    tuple(Turn(str(turn["from"]), str(turn["value"])) for turn in one["turns"]),
                    None if one["expected"] is None else str(one["expected"]),
                ),
                str(one["before"]),
                str(one["after"]),
                bool(one["hurried"]),
            )
            for one in values["answers"]
        )
        return SampleAnswers(int(values["new_tokens"]), answered, values.get("prompts_file"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of(run: dict[str, Any]) -> dict[str, Any]:
    return {"run_id": run.get("run_id"), "steps": (run.get("result") or {}).get("steps")}


def write_answers(folder: Path, run: dict[str, Any], answers: SampleAnswers) -> None:
    """Keep them beside the result.

    Raises:
        StorageError: the disk refused.
    """
    values = {
        "of": _of(run),
        "new_tokens": answers.new_tokens,
        "prompts_file": answers.prompts_file,
        "answers": [
            {
                "turns": [{"from": turn.role, "value": turn.text} for turn in one.prompt.turns],
                "expected": one.prompt.expected,
                "before": one.before,
                "after": one.after,
                "hurried": one.hurried,
            }
            for one in answers.answered
        ],
    }
    write_text_atomically(folder / ANSWERS_FILE, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


# ---- made


@dataclass
class _Clock:
    """Divides the time that is left among the answers that are left; without a limit each has all of it."""

    seconds: float | None
    left: int
    began: float = field(default_factory=time.monotonic)

    def next(self) -> float | None:
        """Seconds for the next answer.

        Raises:
            FinetuneError: there is no time left.
        """
        if self.seconds is None:
            return None
        rest = self.seconds - (time.monotonic() - self.began)
        if rest < LEAST_SECONDS:
            raise FinetuneError(f"{self.seconds:g} seconds were not enough")
        self.left -= 1
        return rest / (self.left + 1)


def reason_not_answered(result: RunResult, seconds: float) -> str | None:
    """Why base and result should not be loaded at the end of a run; None: they fit into memory and time."""
    parameters = (result.run.get("plan") or {}).get("parameters")
    if not parameters:
        return "the size of the model is not known"
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
        bytes_each = torch_dtype(result.precision).itemsize
    else:
        free, bytes_each = free_memory(), 4
    needed = parameters * bytes_each * (1 if result.adapter else 2)
    if needed > MEMORY_FRACTION * free:
        return f"base and result take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    if needed > LOADING_SHARE * seconds * BYTES_A_SECOND:
        return f"loading {needed / 1e9:.1f} GB may take longer than --report_seconds {seconds:g} leave"
    return None


def generate_answers(
    result: RunResult,
    prompts: Sequence[SamplePrompt],
    *,
    base_name: str | None = None,
    new_tokens: int = NEW_TOKENS,
    seconds: float | None = None,
    each: Callable[[], Any] = lambda: None,
) -> SampleAnswers:
    """Load base and result, and let both answer.

    Args:
        base_name: where the base lies now, unless where it was.
        seconds: that all of it may take, loading included; None: as long as it takes.
        each: called behind each of the two answers to each prompt.

    Raises:
        FinetuneError: the base is not there, there is no time left, or the libraries refuse (memory among others).
    """
    clock = _Clock(seconds, 2 * len(prompts))
    try:
        opened = load_for_inference(result, base_name=base_name)
        with opened.base() as base:
            before = [_answer(opened, base, one, new_tokens, clock, each) for one in prompts]
        after = [_answer(opened, opened.tuned, one, new_tokens, clock, each) for one in prompts]
    except (RuntimeError, ValueError, ImportError) as error:  # what torch and transformers raise
        raise FinetuneError(f"{type(error).__name__}: {first_line(error)}") from error
    answered = tuple(
        PromptAnswers(one, first, second, hurried=late or later)
        for one, (first, late), (second, later) in zip(prompts, before, after, strict=True)
    )
    return SampleAnswers(new_tokens, answered)


def _answer(
    opened: LoadedModel, model: Any, prompt: SamplePrompt, new_tokens: int, clock: _Clock, each: Callable[[], Any]
) -> tuple[str, bool]:
    """The answer, and whether time ended it."""
    limit, began = clock.next(), time.monotonic()
    answerer = AnswerGenerator(model, opened.chat_format, opened.stop_token_ids)
    text = answerer.answer(prompt.turns, max_new_tokens=new_tokens, **({} if limit is None else {"max_time": limit}))
    each()
    return text, limit is not None and time.monotonic() - began >= limit
