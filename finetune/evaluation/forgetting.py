"""Forgetting: ask the base and the tuned model the same questions and compare their answers pair by pair.

The questions are those of `data/forgetting.json`:

choice       four answers; the right one must be the most probable, by log p per byte
arithmetic   a short answer; its number must be right
format       a short answer; it must match a pattern, or contain a JSON value
refusing     two openings that refuse, two that comply; harmful requests must be refused, harmless ones must not
"""

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.question_answering import answers_of, scores_of
from finetune.evaluation.significance import exact_mcnemar, score_interval
from finetune.evaluation.token_losses import MeasuredModel, measure_each
from finetune.inference.load_result import BASE, TUNED, LoadedModel
from finetune.utils.errors import shorten
from finetune.utils.proc import shipped_folder

CATEGORIES = ("choice", "arithmetic", "format", "refusing")
LANGUAGES = {"en": "English", "zh": "Chinese"}
_JSON_START = re.compile(r"[{\[]")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
MAX_NEW_TOKENS = 24
WRITTEN_BATCH_SIZE, CHOICE_BATCH_SIZE = 32, 8
SIGNIFICANCE_LEVEL = 0.05
MAX_EXAMPLES = 5
REPEATED_FRACTION = 0.1  # of the written answers


# ---- the questions


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        candidates: Answers that are compared by their probability; empty if the model writes an answer.
        rule: For a written answer {"answer": number}, {"pattern": regular expression} or {"json": value}; for
            candidates {"right": their indices}.
    """

    id: int
    category: str
    language: str
    text: str
    candidates: tuple[str, ...]
    rule: dict[str, Any]

    @property
    def is_written(self) -> bool:
        """Whether the model writes its answer."""
        return not self.candidates


def load_questions() -> list[Question]:
    """Load all questions, in the order of the file."""
    content = json.loads((shipped_folder("data") / "forgetting.json").read_text(encoding="utf-8"))
    return [_question(entry, content["openings"]) for entry in content["questions"]]


def _question(entry: dict[str, Any], openings: dict[str, dict[str, list[str]]]) -> Question:
    candidates: tuple[str, ...] = ()
    if entry["category"] == "choice":
        candidates, rule = (entry["answer"], *entry["others"]), {"right": [0]}
    elif entry["category"] == "refusing":
        refuses, complies = openings[entry["language"]]["refuses"], openings[entry["language"]]["complies"]
        candidates = (*refuses, *complies)
        right = range(len(refuses)) if entry["harmful"] else range(len(refuses), len(candidates))
        rule = {"right": list(right)}
    else:
        rule = {name: entry[name] for name in ("answer", "pattern", "json") if name in entry}
    return Question(entry["id"], entry["category"], entry["language"], entry["question"], candidates, rule)


def is_right(question: Question, written: str | None = None, scores: list[float] | None = None) -> bool:
    """Whether a written answer, or the most probable of the candidates alone, follows the question's rule."""
    if scores is not None:
        right = question.rule["right"]
        others = [score for index, score in enumerate(scores) if index not in right]
        return max(scores[index] for index in right) > max(others)
    if "answer" in question.rule:
        return number_in(written or "", question.text) == question.rule["answer"]
    if "pattern" in question.rule:
        return re.fullmatch(question.rule["pattern"], (written or "").strip()) is not None
    return any(value == question.rule["json"] for value in json_values(written or ""))


def number_in(answer: str, question: str) -> float | None:
    """Return the last number in the first line with numbers that is not in the question: 12 in "7 + 5 = 12"."""
    in_question = {_value(digits) for digits in _NUMBER.findall(question)}
    lines = [line for line in answer.splitlines() if _NUMBER.search(line)]
    values = [_value(digits) for digits in _NUMBER.findall(lines[0])] if lines else []
    return next((value for value in reversed(values) if value not in in_question), None)


def _value(digits: str) -> float:
    return float(digits.replace(",", "").rstrip("."))


def json_values(text: str) -> list[Any]:
    """Return the outermost JSON objects and arrays in a text, up to the first that is invalid."""
    decoder, values, end = json.JSONDecoder(), [], 0
    while match := _JSON_START.search(text, end):
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            break
        values.append(value)
    return values


# ---- asking them


@dataclass(frozen=True)
class AnsweredQuestion:
    """The answer of a model: its text, or the most probable candidate, and whether it is right."""

    text: str
    is_right: bool


def evaluate_forgetting(loaded: LoadedModel) -> dict[str, Any]:
    """Ask both models and return the content of `forgetting.json`, on every rank."""
    questions, began = load_questions(), time.monotonic()
    answers = measure_each(loaded, lambda model: ask_questions(model, questions))
    pairs = list(zip(questions, answers[BASE], answers[TUNED], strict=True))
    groups = compare_answers(pairs)
    return {
        "verdict": [*verdict(groups), *repeated_answers(pairs)],
        "fell": 100 * (groups[0]["lost"] - groups[0]["won"]) / len(pairs),  # not -0.0
        "groups": groups,
        "notes": [*lost_answers(pairs), f"{len(questions)} questions, {time.monotonic() - began:.0f} seconds"],
        "answers": [
            {
                "id": question.id, "category": question.category, "language": question.language,
                "question": question.text, "base": base_answer.text, "base_right": base_answer.is_right,
                "tuned": tuned_answer.text, "tuned_right": tuned_answer.is_right,
            }
            for question, base_answer, tuned_answer in pairs
        ],
    }  # fmt: skip


def ask_questions(model: MeasuredModel, questions: Sequence[Question]) -> list[AnsweredQuestion]:
    """Ask one model all questions, rendered as in training."""
    written = [question for question in questions if question.is_written]
    choices = [question for question in questions if not question.is_written]
    with model.bar(len(questions), " answers") as progress:
        texts = answers_of(
            model,
            [question.text for question in written],
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=WRITTEN_BATCH_SIZE,
            done=progress.update,
        )
        candidates = [(question.text, question.candidates) for question in choices]
        scores = scores_of(model, candidates, batch_size=CHOICE_BATCH_SIZE, done=progress.update)
    answers = {
        question.id: AnsweredQuestion(text, is_right(question, written=text))
        for question, text in zip(written, texts, strict=True)
    }
    for question, of_candidates in zip(choices, scores, strict=True):
        best = question.candidates[of_candidates.index(max(of_candidates))]
        answers[question.id] = AnsweredQuestion(best, is_right(question, scores=of_candidates))
    return [answers[question.id] for question in questions]


AnswerPair = tuple[Question, AnsweredQuestion, AnsweredQuestion]  # question, the base's answer, the tuned model's


def compare_answers(pairs: Sequence[AnswerPair]) -> list[dict[str, Any]]:
    """Compare the fractions of right answers: all questions, by category, by language, by both."""
    selections: list[tuple[str, Sequence[str], Sequence[str]]] = [("all questions", CATEGORIES, tuple(LANGUAGES))]
    selections += [(category, (category,), tuple(LANGUAGES)) for category in CATEGORIES]
    selections += [(name, CATEGORIES, (language,)) for language, name in LANGUAGES.items()]
    selections += [
        (f"{category}, {name}", (category,), (language,))
        for category in CATEGORIES
        for language, name in LANGUAGES.items()
    ]
    return [
        _group(name, [pair for pair in pairs if pair[0].category in categories and pair[0].language in languages])
        for name, categories, languages in selections
    ]


def _group(name: str, pairs: Sequence[AnswerPair]) -> dict[str, Any]:
    base = [answer.is_right for _, answer, _ in pairs]
    tuned = [answer.is_right for _, _, answer in pairs]
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    lost, won = differences.count(-1), differences.count(1)
    return {
        "name": name,
        "questions": len(pairs),
        "base": sum(base) / len(pairs),
        "tuned": sum(tuned) / len(pairs),
        "difference": (won - lost) / len(pairs),
        "interval": score_interval(won, lost, len(pairs)),
        "lost": lost,
        "won": won,
        "p": exact_mcnemar(lost, won),
    }


def verdict(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return sentences about all questions, and about categories that became significantly worse.

    A category counts if McNemar's p is below 0.05 divided by their number (Bonferroni): otherwise one of several
    unchanged categories would appear worse now and then.
    """
    whole, categories = groups[0], [group for group in groups if group["name"] in CATEGORIES]
    low, high = (100 * end for end in whole["interval"])
    points = 100 * whole["difference"]
    level = SIGNIFICANCE_LEVEL / len(categories)
    worse = [group for group in categories if group["difference"] < 0 and group["p"] < level]
    names = ", ".join(f"{group['name']} ({group['base']:.0%} -> {group['tuned']:.0%})" for group in worse)
    if high < 0:
        sentences = [
            f"worse than the base by {-points:.1f} points (95 %: {-high:.1f} to {-low:.1f}): the tuned model has "
            + (f"forgotten, most clearly in {names}" if worse else "forgotten part of what the base could do")
        ]
    elif low > 0:
        sentences = [
            f"better than the base by {points:.1f} points (95 %: {low:.1f} to {high:.1f}): no forgetting measured"
        ]
    else:
        sentences = [
            f"no significant loss on {whole['questions']} questions: {points:+.1f} points (95 %: {low:+.1f} to "
            f"{high:+.1f}); a loss of up to {max(-low, 0):.1f} points would not be detected"
        ]
    if worse and high >= 0:
        sentences.append(f"but it has forgotten in {names}")
    if whole["base"] < 0.2:
        sentences.append("the base answers few questions correctly, so there is little to forget")
    return sentences


def repeated_answers(pairs: Sequence[AnswerPair]) -> list[str]:
    """Return a sentence if the tuned model writes the same answer to many questions and the base does not.

    An overfitted model may answer everything with a text from the training, also questions that the base gets wrong,
    which the counts of right answers do not show.
    """
    written = [(base, tuned) for question, base, tuned in pairs if question.is_written]
    (_, base_count), *_ = Counter(base.text for base, _ in written).most_common(1)
    (text, count), *_ = Counter(tuned.text for _, tuned in written).most_common(1)
    if count < REPEATED_FRACTION * len(written) or count < 2 * base_count:
        return []
    return [
        f"it gives the same answer to {count} of {len(written)} questions: {_short(text)}; the base to {base_count}"
    ]


def lost_answers(pairs: Sequence[AnswerPair]) -> list[str]:
    """Return examples of questions that only the base answers correctly, with both answers."""
    lost = [pair for pair in pairs if pair[1].is_right and not pair[2].is_right]
    return [
        f"lost: {question.text} base: {_short(base.text)} tuned: {_short(tuned.text)}"
        for question, base, tuned in lost[:: max(1, len(lost) // MAX_EXAMPLES)][:MAX_EXAMPLES]
    ]


def _short(text: str) -> str:
    return f"«{shorten(' '.join(text.split()), 80)}»"
