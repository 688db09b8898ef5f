"""Answers of the base model and of the result to a few prompts; generated once, kept as `answers.json`.

Decoding is greedy. The prompts are the first human turns of the rows in `samples.json`, with the answer of the data
beside them, or those of a file.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from finetune.conversation import Role, Turn, to_row
from finetune.inference.generate import AnswerGenerator, AnswerStream
from finetune.inference.load_result import MEMORY_FRACTION, free_memory, load_for_inference
from finetune.inference.run_result import RunResult
from finetune.run_dir.data_samples import RowSample
from finetune.utils.atomic_io import write_text_atomically
from finetune.utils.errors import ConfigError, FinetuneError, first_line
from finetune.utils.user_files import UNREADABLE, read_json, read_text

ANSWERS_FILE = "answers.json"
NEW_TOKENS = 96
LOADING_SHARE, BYTES_PER_SECOND = 0.6, 1e9  # of the time, for loading; what a warm disk reads at least
MIN_SECONDS = 0.5


@dataclass(frozen=True)
class SamplePrompt:
    """Turns that end with a human turn, and the answer of the data (None where it has none).

    `ids` are the tokens of the prompt in the training, with what no turn shows (declared tools); else the turns are
    rendered.
    """

    turns: tuple[Turn, ...]
    expected: str | None = None
    ids: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class PromptAnswers:
    """A prompt, the base's answer and the result's.

    `cut` names those ("before", "after") that do not end by themselves; `hurried`: the time limit cut one off.
    """

    prompt: SamplePrompt
    before: str
    after: str
    hurried: bool = False
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleAnswers:
    """The answered prompts of a run, each answer of at most `new_tokens` tokens."""

    new_tokens: int
    answered: tuple[PromptAnswers, ...]
    prompts_file: str | None = None


def prompts_of(samples: Sequence[RowSample], count: int) -> list[SamplePrompt]:
    """Return the first human turns, after a system turn, of up to `count` different rows that were kept whole."""
    prompts: dict[tuple[Turn, ...], SamplePrompt] = {}
    for sample in samples:
        turns = [
            Turn(cast(Role, turn.role), turn.text) for example in sample.examples[:1] for turn in example if turn.role
        ]
        begin = 1 if turns and turns[0].role == "system" else 0
        asked = tuple(turns[: begin + 1])
        if sample.status != "kept" or sample.unshown or len(asked) <= begin or asked[-1].role != "human":
            continue
        if asked[-1].text.strip() and len(prompts) < count:
            expected = [turn.text for turn in turns[begin + 1 : begin + 2] if turn.role == "model"]
            prompts.setdefault(asked, SamplePrompt(asked, expected[0] if expected else None, tuple(sample.prompt)))
    return list(prompts.values())


def read_prompts(path: Path) -> list[SamplePrompt]:
    """Read prompts from a file: one a line, or a JSON array of texts or of objects with a `question`."""
    shown = f"--prompts {path}"
    values: Any = read_json(path, shown) if path.suffix == ".json" else read_text(path, shown).split("\n")
    entries = values if isinstance(values, list) else [None]
    texts = [entry.get("question") if isinstance(entry, dict) else entry for entry in entries if entry != ""]
    questions = [text.strip() for text in texts if isinstance(text, str)]
    if len(questions) < len(texts):
        raise ConfigError(f'--prompts {path}: expected an array of texts, or of objects with a "question"')
    prompts = [SamplePrompt((Turn("human", question),)) for question in questions if question]
    if not prompts:
        raise ConfigError(f"--prompts {path}: holds no prompt: write one a line")
    return prompts


def read_answers(folder: Path, run: dict[str, Any]) -> SampleAnswers | None:
    """Return the stored answers; None where there are none, or those of another run or step."""
    try:
        values = json.loads((folder / ANSWERS_FILE).read_text(encoding="utf-8"))
        if values["of"] != _identity(run):
            return None
        answered = tuple(map(_answers_from_json, values["answers"]))
        return SampleAnswers(int(values["new_tokens"]), answered, values.get("prompts_file"))
    except UNREADABLE:
        return None


def _answers_from_json(values: dict[str, Any]) -> PromptAnswers:
    turns = tuple(Turn(cast(Role, str(turn["from"])), str(turn["value"])) for turn in values["turns"])
    expected = None if values["expected"] is None else str(values["expected"])
    answers = str(values["before"]), str(values["after"])
    cut = tuple(map(str, values.get("cut") or ()))
    return PromptAnswers(SamplePrompt(turns, expected), *answers, hurried=bool(values["hurried"]), cut=cut)


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    return {"run_id": run.get("run_id"), "steps": (run.get("result") or {}).get("steps")}


def write_answers(folder: Path, run: dict[str, Any], answers: SampleAnswers) -> None:
    """Store the answers beside the result."""
    values = {
        "of": _identity(run),
        "new_tokens": answers.new_tokens,
        "prompts_file": answers.prompts_file,
        "answers": [
            {
                "turns": to_row(answered.prompt.turns)["conversations"],
                "expected": answered.prompt.expected,
                "before": answered.before,
                "after": answered.after,
                "hurried": answered.hurried,
                "cut": answered.cut,
            }
            for answered in answers.answered
        ],
    }
    write_text_atomically(folder / ANSWERS_FILE, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


# ---- generation


def reason_not_answered(result: RunResult, seconds: float) -> str | None:
    """Return why base and result should not be loaded at the end of a run; None: they fit into memory and time."""
    parameters = (result.run.get("plan") or {}).get("parameters")
    if not parameters:
        return "the size of the model is not known"
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
        weight_size = 4 if result.precision == "float32" else 2
    else:
        free, weight_size = free_memory(), 4
    needed = parameters * weight_size * (1 if result.adapter else 2)
    if needed > MEMORY_FRACTION * free:
        return f"base and result take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    if needed > LOADING_SHARE * seconds * BYTES_PER_SECOND:
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
        seconds: for everything, loading included; None: no limit.
        each: called after each of the two answers to each prompt.
    """
    began, left = time.monotonic(), 2 * len(prompts)

    def answer(model: Any, prompt: SamplePrompt) -> tuple[AnswerStream, bool]:
        """Answer in an equal share of the time that is left; return whether that has cut the answer off, too."""
        nonlocal left
        options: dict[str, Any] = {}
        if seconds is not None:
            rest = seconds - (time.monotonic() - began)
            if rest < MIN_SECONDS:
                raise FinetuneError(f"{seconds:g} seconds were not enough")
            options["max_time"] = rest / left
        left, started = left - 1, time.monotonic()
        generator = AnswerGenerator(model, loaded.chat_format, loaded.stop_token_ids)
        stream = generator.stream(prompt.turns, prompt=prompt.ids, max_new_tokens=new_tokens, **options)
        for _ in stream:
            pass
        each()
        return stream, time.monotonic() - started >= options.get("max_time", math.inf)

    try:
        loaded = load_for_inference(result, base_name=base_name)
        with loaded.base() as base:
            before = [answer(base, prompt) for prompt in prompts]
        after = [answer(loaded.tuned, prompt) for prompt in prompts]
    except (RuntimeError, ValueError, ImportError) as error:  # from torch and transformers
        raise FinetuneError(f"{type(error).__name__}: {first_line(error)}") from error
    answered = tuple(
        PromptAnswers(
            prompt,
            first.text,
            second.text,
            hurried=first_hurried or second_hurried,
            cut=tuple(name for name, stream in (("before", first), ("after", second)) if not stream.ended),
        )
        for prompt, (first, first_hurried), (second, second_hurried) in zip(prompts, before, after, strict=True)
    )
    return SampleAnswers(new_tokens, answered)
