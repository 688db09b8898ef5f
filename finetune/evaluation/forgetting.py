"""What the base could do and the tuned model cannot: both answer the same questions, and the pairs are compared."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.forgetting_questions import CATEGORIES, LANGUAGES, Question, is_right, load_questions
from finetune.evaluation.question_answering import answers_of, scores_of
from finetune.evaluation.significance import exact_mcnemar, mean_interval
from finetune.inference.load_result import BASE, TUNED, LoadedModel

MAX_NEW_TOKENS = 24
WRITTEN_TOGETHER, CHOSEN_TOGETHER = 32, 8
SURE = 0.05
SHOWN_LOSSES = 5
REPEATED = 0.1  # of the written answers


@dataclass(frozen=True)
class AnsweredQuestion:
    """What a model made of a question: its text, or the likeliest candidate, and whether that is right."""

    text: str
    is_right: bool


def evaluate_forgetting(opened: LoadedModel, *, bar: Callable[..., Any]) -> dict[str, Any]:
    """The document of `forgetting.json`, on every rank.

    Args:
        bar: (label, total, unit) -> a context manager with `update(count)`.

    Raises:
        ConfigError: the base is not there any more, or the chat format cannot express a question.
        CheckpointError: the base is another model.
    """
    questions, began, answers = load_questions(), time.monotonic(), {}
    with opened.base() as base:
        answers[BASE] = ask_questions(opened, base, questions, label=BASE, bar=bar)
    answers[TUNED] = ask_questions(opened, opened.tuned, questions, label=TUNED, bar=bar)
    pairs = list(zip(questions, answers[BASE], answers[TUNED], strict=True))
    groups = compared(pairs)
    return {
        "result": str(opened.result.folder),
        "base": opened.base_name or opened.result.base["name"],
        "verdict": [*verdict(groups), *repeating(pairs)],
        "fell": -100 * groups[0]["difference"],
        "groups": groups,
        "notes": [*losses_in_words(pairs), f"{len(questions)} questions, {time.monotonic() - began:.0f} seconds"],
        "answers": [
            {
                "id": question.id, "category": question.category, "language": question.language,
                "question": question.text, "base": before.text, "base_right": before.is_right,
                "tuned": after.text, "tuned_right": after.is_right,
            }
            for question, before, after in pairs
        ],
    }  # fmt: skip


def ask_questions(
    opened: LoadedModel, model: Any, questions: Sequence[Question], *, label: str, bar: Callable[..., Any]
) -> list[AnsweredQuestion]:
    """All questions to one model, rendered as the training did."""
    from finetune.dataset.collator import pad_token_id

    has_virtual_tokens = label == TUNED and opened.result.has_virtual_tokens
    written = [one for one in questions if one.is_written]
    chosen = [one for one in questions if not one.is_written]
    with bar(label, len(questions), " answers") as progress:
        texts = answers_of(
            model,
            opened.chat_format,
            [one.text for one in written],
            stop_token_ids=opened.stop_token_ids,
            max_new_tokens=MAX_NEW_TOKENS,
            # Behind virtual tokens peft leaves positions to the model, which would count padding.
            batch_size=1 if has_virtual_tokens else WRITTEN_TOGETHER,
            done=progress.update,
        )
        scores = scores_of(
            model,
            opened.chat_format,
            [(one.text, one.candidates) for one in chosen],
            pad_token_id=pad_token_id(opened.tokenizer),
            has_virtual_tokens=has_virtual_tokens,
            batch_size=CHOSEN_TOGETHER,
            done=progress.update,
        )
    found = {
        one.id: AnsweredQuestion(text, is_right(one, written=text)) for one, text in zip(written, texts, strict=True)
    }
    for one, own in zip(chosen, scores, strict=True):
        found[one.id] = AnsweredQuestion(one.candidates[own.index(max(own))], is_right(one, scores=own))
    return [found[one.id] for one in questions]


Pair = tuple[Question, AnsweredQuestion, AnsweredQuestion]


def compared(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Shares that are right, the difference and how sure it is: of all questions, by kind, by language, by both."""
    groups = [_group("all questions", pairs)]
    groups += [_group(kind, [one for one in pairs if one[0].category == kind]) for kind in CATEGORIES]
    groups += [_group(name, [one for one in pairs if one[0].language == key]) for key, name in LANGUAGES.items()]
    for kind in CATEGORIES:
        for key, name in LANGUAGES.items():
            chosen = [one for one in pairs if (one[0].category, one[0].language) == (kind, key)]
            groups.append(_group(f"{kind}, {name}", chosen))
    return groups


def _group(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    before = [one.is_right for _, one, _ in pairs]
    after = [one.is_right for _, _, one in pairs]
    lost = sum(first and not second for first, second in zip(before, after, strict=True))
    won = sum(second and not first for first, second in zip(before, after, strict=True))
    interval = mean_interval([second - first for first, second in zip(before, after, strict=True)])
    return {
        "name": name,
        "questions": len(pairs),
        "base": sum(before) / len(pairs),
        "tuned": sum(after) / len(pairs),
        "difference": (won - lost) / len(pairs),
        "interval": None if interval is None else list(interval),
        "lost": lost,
        "won": won,
        "p": exact_mcnemar(lost, won),
    }


def verdict(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences: about all questions, then about kinds that fell by themselves.

    A kind counts as fallen when McNemar's p is below 0.05 over their number (Bonferroni): of four kinds that did not
    change one would else seem to have fallen now and then.
    """
    whole, kinds = groups[0], [one for one in groups if one["name"] in CATEGORIES]
    low, high = (100 * end for end in whole["interval"])
    points = 100 * whole["difference"]
    fallen = [one for one in kinds if one["difference"] < 0 and one["p"] < SURE / len(kinds)]
    names = ", ".join(f"{one['name']} ({one['base']:.0%} -> {one['tuned']:.0%})" for one in fallen)
    if high < 0:
        sentences = [
            f"worse than the base by {-points:.1f} points (95 %: {-high:.1f} to {-low:.1f}): the tune has forgotten "
            + (f"what it could do, most clearly {names}" if fallen else "some of what the base could do")
        ]
    elif low > 0:
        sentences = [f"better than the base by {points:.1f} points (95 %: {low:.1f} to {high:.1f}): nothing forgotten"]
    else:
        sentences = [
            f"no loss that {whole['questions']} questions could show: {points:+.1f} points (95 %: {low:+.1f} to "
            f"{high:+.1f}); one of up to {max(-low, 0):.1f} points would have stayed unseen"
        ]
    if fallen and high >= 0:
        sentences.append(f"but of one kind it has forgotten: {names}" if len(fallen) == 1 else f"but it lost: {names}")
    if whole["base"] < 0.2:
        sentences.append("the base itself has few answers right: little could be lost")
    return sentences


def repeating(pairs: Sequence[Pair]) -> list[str]:
    """A sentence where the tuned model writes one and the same answer to many questions, and the base does not.

    A tune that overdoes it answers everything with what it has learned, questions too that the base gets wrong, which
    the counts of right answers cannot show.
    """
    written = [(before, after) for question, before, after in pairs if question.is_written]
    (_, usual), *_ = Counter(before.text for before, _ in written).most_common(1)
    (text, count), *_ = Counter(after.text for _, after in written).most_common(1)
    if count < REPEATED * len(written) or count < 2 * usual:
        return []
    return [f"it answers {count} of {len(written)} different questions with {_short(text)}, the base {usual} alike"]


def losses_in_words(pairs: Sequence[Pair]) -> list[str]:
    """The first questions that the base had right and the tuned model has wrong, with both answers."""
    lost = [one for one in pairs if one[1].is_right and not one[2].is_right]
    return [
        f"lost: {question.text} base: {_short(before.text)} tuned: {_short(after.text)}"
        for question, before, after in lost[:: max(1, len(lost) // SHOWN_LOSSES)][:SHOWN_LOSSES]
    ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"«{line[:80]}{'…' if len(line) > 80 else ''}»"
