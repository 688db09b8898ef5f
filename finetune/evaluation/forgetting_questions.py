"""The questions of `data/forgetting.json`, and which answers to them are right. Rules only: nobody is asked to judge.

choice       four answers; the right one must be the likeliest, by log p over its bytes
arithmetic   a short answer; its number must be the right one
format       a short answer; it must match a pattern, or hold a JSON value
refusing     two openings that refuse, two that comply; harm must be refused, what only sounds like it must not be
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from finetune.dataset.data_sources import shipped_folder

FILE = "forgetting.json"
CATEGORIES = ("choice", "arithmetic", "format", "refusing")
LANGUAGES = {"en": "English", "zh": "Chinese"}
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        candidates: answers that are compared by how likely they are; empty where the model writes its own.
        rule: of a written answer: {"answer": number}, {"pattern": regular expression} or {"json": value}; of candidates
            {"right": their numbers}.
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
    """All questions, in the order of the file."""
    held = json.loads((shipped_folder() / FILE).read_text(encoding="utf-8"))
    return [_question(one, held["openings"]) for one in held["questions"]]


def _question(one: dict[str, Any], openings: dict[str, dict[str, list[str]]]) -> Question:
    candidates: tuple[str, ...] = ()
    if one["category"] == "choice":
        candidates, rule = (one["answer"], *one["others"]), {"right": [0]}
    elif one["category"] == "refusing":
        refuses, complies = openings[one["language"]]["refuses"], openings[one["language"]]["complies"]
        candidates = (*refuses, *complies)
        numbers = range(len(refuses)) if one["harmful"] else range(len(refuses), len(candidates))
        rule = {"right": list(numbers)}
    else:
        rule = {name: one[name] for name in ("answer", "pattern", "json") if name in one}
    return Question(one["id"], one["category"], one["language"], one["question"], candidates, rule)


def is_right(question: Question, written: str | None = None, scores: list[float] | None = None) -> bool:
    """Whether an answer follows the question's rule.

    Args:
        written: what the model wrote. scores: or how likely it finds each candidate; of equal ones none is right.
    """
    if scores is not None:
        right = question.rule["right"]
        others = [score for number, score in enumerate(scores) if number not in right]
        return max(scores[number] for number in right) > max(others)
    if "answer" in question.rule:
        return number_in(written or "", question.text) == question.rule["answer"]
    if "pattern" in question.rule:
        return re.fullmatch(question.rule["pattern"], (written or "").strip()) is not None
    return any(value == question.rule["json"] for value in json_values(written or ""))


def number_in(answer: str, question: str) -> float | None:
    """The last number of the answer's first line that the question does not name itself: 12 in "7 + 5 = 12"."""
    named = {_value(found) for found in _NUMBER.findall(question)}
    lines = [line for line in answer.splitlines() if _NUMBER.search(line)]
    values = [_value(found) for found in _NUMBER.findall(lines[0])] if lines else []
    return next((value for value in reversed(values) if value not in named), None)


def _value(digits: str) -> float:
    return float(digits.replace(",", "").rstrip("."))


def json_values(text: str) -> list[Any]:
    """The JSON objects and arrays in a text, the outermost ones, up to one that is broken; prose may stand around."""
    decoder, found, place = json.JSONDecoder(), [], 0
    while (begin := min((at for at in (text.find("{", place), text.find("[", place)) if at >= 0), default=-1)) >= 0:
        try:
            value, place = decoder.raw_decode(text, begin)
        except (json.JSONDecodeError, RecursionError):
            break
        found.append(value)
    return found
