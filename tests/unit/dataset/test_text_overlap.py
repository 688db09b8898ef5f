"""Near-duplicates and questions in texts, against plain set arithmetic."""

import importlib.util
import random

import pytest

from finetune.dataset.text_overlap import (
    BOILERPLATE,
    OVERLAP,
    SHINGLE,
    NearDuplicates,
    QuestionIndex,
    check_datasketch,
    sequence_hashes,
    word_hashes,
)
from finetune.utils.errors import ConfigError

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


def text_of(count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return [f"{drawn.choice(WORDS)}{drawn.randrange(50)}" for _ in range(count)]


def test_words_are_runs_of_letters_in_lower_case_and_single_characters_of_chinese():
    same = word_hashes("Hello, WORLD 42! 你好ok かな")
    assert list(same) == list(word_hashes("hello world 42 你 好 ok か な")) and len(set(same.tolist())) == 8
    assert len(word_hashes("... _ 👩‍👧")) == 0


@pytest.mark.parametrize("count", [0, 1, SHINGLE - 1, SHINGLE, SHINGLE + 1, 40])
def test_sequences_are_those_of_the_words(count):
    words = text_of(count, 1) * 2
    length = min(SHINGLE, len(words))
    expected = {tuple(words[begin : begin + length]) for begin in range(len(words) - length + 1)} if words else set()
    assert len(sequence_hashes(word_hashes(" ".join(words)), SHINGLE)) == len(expected)


def test_the_order_of_words_counts():
    one, other = (set(sequence_hashes(word_hashes(text), 3).tolist()) for text in ("a b c d", "d c b a"))
    assert not one & other


def test_near_duplicates_are_those_of_a_high_similarity():
    near, base = NearDuplicates(), text_of(200, 2)
    close, far = [*base], [*base]
    close[100] = "changed"  # 5 of 196 sequences differ: Jaccard 191 / 201
    for position in range(0, 200, 8):  # 125 differ
        far[position] = "changed"
    texts = {"base": base, "close": close, "far": far, "other": text_of(200, 3), "again": base, "empty": []}
    found = {name: near.first_like(word_hashes(" ".join(words)), name) for name, words in texts.items()}
    assert {name: like and like[0] for name, like in found.items()} == {
        "base": None, "close": "base", "far": None, "other": None, "again": "base", "empty": None,
    }  # fmt: skip
    assert found["close"][1] == pytest.approx(191 / 201, abs=0.1) and found["again"][1] == 1


def test_questions_are_found_by_any_of_their_sequences():
    questions = [" ".join(text_of(20, seed)) for seed in range(4)]
    index = QuestionIndex({"exam": [*questions, "too short to count"], "others": [" ".join(text_of(OVERLAP, 9))]})
    assert index.names == ["exam"] * 4 + ["others"]
    index.add(word_hashes("Nothing of it. " * 9), "row 0")
    index.add(word_hashes("It says: " + " ".join(questions[1].split()[3 : 3 + OVERLAP]) + " and more"), "row 1")
    index.add(word_hashes(" ".join(questions[2].split()[: OVERLAP - 1])), "row 2")
    index.add(word_hashes(questions[1].upper() + "? " + " ".join(text_of(OVERLAP, 9))), "row 3")
    assert index.first_place == {1: "row 1", 4: "row 3"}
    QuestionIndex({}).add(word_hashes(questions[0]), "row 0")


def test_what_many_questions_share_is_an_instruction():
    instruction = " ".join(text_of(30, 5))
    index = QuestionIndex({"exam": [f"{instruction} {' '.join(text_of(3, n))}" for n in range(100, 101 + BOILERPLATE)]})
    index.add(word_hashes(instruction), "row 0")
    assert index.first_place == {} and len(index.names) == 1 + BOILERPLATE


def test_without_datasketch_the_error_says_how_to_install_it(monkeypatch):
    check_datasketch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'datasketch"):
        check_datasketch()
