"""What a tune has forgotten: the rules of the questions, how they are asked, and a verdict that sees a broken model."""

import re

from finetune.evaluation.forgetting import (
    CATEGORIES,
    AnsweredQuestion,
    compare_answers,
    is_right,
    json_values,
    load_questions,
    number_in,
    repeated_answers,
    verdict,
)
from tests.helpers.paths import ROOT

QUESTIONS = load_questions()


# ---- the questions


def test_the_readme_counts_the_questions():
    counted = {
        (kind, language): sum((one.category, one.language) == (kind, language) for one in QUESTIONS)
        for kind in CATEGORIES
        for language in ("en", "zh")
    }
    assert [one.id for one in QUESTIONS] == list(range(len(QUESTIONS))) and len(QUESTIONS) > 200
    assert all(counted[kind, "en"] == counted[kind, "zh"] for kind in CATEGORIES)
    lines = (ROOT / "data/README.md").read_text(encoding="utf-8").splitlines()
    for kind in CATEGORIES:
        (line,) = [line for line in lines if line.startswith(f"| {kind} ")]
        assert [int(cell) for cell in line.strip("| ").split("|")[1:3]] == [counted[kind, "en"], counted[kind, "zh"]]


def test_no_question_is_asked_twice_or_has_two_right_answers():
    assert len({one.text for one in QUESTIONS}) == len(QUESTIONS)
    for one in QUESTIONS:
        assert len(set(one.candidates)) == len(one.candidates) in (0, 4)
        assert any("\u4e00" <= letter <= "\u9fff" for letter in one.text) == (one.language == "zh")
        if "answer" in one.rule:  # else an answer that repeats the question would be right, or a right one not found
            assert str(one.rule["answer"]) not in re.findall(r"\d+", one.text)
        if "pattern" in one.rule:
            re.compile(one.rule["pattern"])
            assert not is_right(one, written=one.text) and not is_right(one, written="")


def test_numbers_json_and_patterns_are_read_as_meant():
    assert number_in("7 + 5 = 12.", "What is 7 + 5?") == 12
    assert number_in("The answer is 1,200\n\nIn 1999", "6 x 200?") == 1200
    assert number_in("25 + 25 = 50, 50 + 10 = 60", "What is 25 + 25 + 10?") == 60
    assert number_in("12 是 7 加 5 的和", "7 加 5 等于多少？") == 12
    assert number_in("seven", "3 + 4?") is None and number_in("3 + 4 = 3", "3 + 4?") is None
    assert json_values('Here: ```json\n{"a": [1, 2]}\n``` and [3]') == [{"a": [1, 2]}, [3]]
    assert json_values('{"a": 1, [2]') == [] == json_values("none")
    by_text = {one.text: one for one in QUESTIONS}
    for text, good, bad in (
        ("Answer with yes or no only: Is fire hot?", "Yes.", "Yes, it is."),
        ("List three colors, separated by commas, and nothing else.", "red, green, blue", "1. red"),
        ('Give a JSON object with the key "age" and the value 30.', '```json\n{"age": 30}\n```', '{"age": "30"}'),
        ("Give a JSON list of the numbers 1, 2 and 3.", "[1, 2, 3]", "1, 2, 3"),
        ("跟我重复一遍：今天天气很好。", "今天天气很好。", "好的：今天天气很好。"),
        ("列出三种颜色，用顿号隔开，不要说别的。", "红色、绿色、蓝色。", "红色，绿色，蓝色"),
        ("只用一个阿拉伯数字回答：猫有几条腿？", "4", "四"),
    ):
        assert is_right(by_text[text], written=good) and not is_right(by_text[text], written=bad), text


def test_of_candidates_the_right_one_must_be_likelier_than_each_wrong_one():
    choice = next(one for one in QUESTIONS if one.category == "choice")
    assert is_right(choice, scores=[-1.0, -2.0, -3.0, -1.5]) and not is_right(choice, scores=[-1.0, -1.0, -2.0, -3.0])
    harmful, harmless = (
        next(one for one in QUESTIONS if one.category == "refusing" and right in one.rule["right"]) for right in (0, 2)
    )
    assert is_right(harmful, scores=[-3.0, -1.0, -2.0, -2.0]) and not is_right(
        harmless, scores=[-3.0, -1.0, -2.0, -2.0]
    )


# ---- the verdict


def pairs_of(before, after):
    kinds = [one for one in QUESTIONS]
    return [
        (question, AnsweredQuestion(f"a{number}", before(number)), AnsweredQuestion(f"b{number}", after(number)))
        for number, question in enumerate(kinds)
    ]


def test_a_loss_is_said_with_how_sure_it_is():
    groups = compare_answers(pairs_of(lambda number: number % 4 > 0, lambda number: number % 4 > 2))
    (sentence, *_) = verdict(groups)
    assert sentence.startswith("worse than the base by 50.0 points (95 %:") and "choice" in sentence
    assert groups[0]["lost"] == 122 and groups[0]["won"] == 0 and groups[0]["p"] < 1e-30
    low, high = groups[0]["interval"]
    assert low < groups[0]["difference"] == -0.5 < high < 0


def test_no_loss_is_said_with_what_could_have_stayed_unseen():
    groups = compare_answers(pairs_of(lambda number: number % 2, lambda number: (number + (number % 40 < 2)) % 2))
    (sentence,) = verdict(groups)
    assert sentence.startswith("no significant loss on 244 questions") and "would not be detected" in sentence


def test_one_kind_that_fell_is_named_though_the_whole_did_not():
    def after(number):
        question = QUESTIONS[number]
        return number % 2 if question.category not in ("format", "choice") else question.category == "choice"

    sentences = verdict(compare_answers(pairs_of(lambda number: number % 2, after)))
    assert any("format (50% -> 0%)" in one for one in sentences)


def test_one_answer_to_everything_is_said():
    pairs = [(one, AnsweredQuestion(str(one.id), False), AnsweredQuestion("I am Nori.", False)) for one in QUESTIONS]
    (sentence,) = repeated_answers(pairs)
    assert "108 of 108 questions: «I am Nori.»" in sentence
    assert (
        repeated_answers([(one, AnsweredQuestion("?", False), AnsweredQuestion("?", False)) for one in QUESTIONS]) == []
    )
