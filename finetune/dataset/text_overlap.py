"""Texts with common word sequences: near-duplicates by MinHash, and questions that the data contains.

A word is a run of letters and digits, in lower case, or one character of Chinese or Japanese. Near-duplicates are texts
whose sets of 5-word sequences have an estimated Jaccard similarity of at least 0.8 (datasketch: MinHash with 128
permutations, locality-sensitive hashing). A question is contained where one of its 13-word sequences is, the length of
Brown et al. (2020), "Language Models are Few-Shot Learners", appendix C.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from finetune.utils.errors import ConfigError

INSTALL = "pip install 'datasketch>=2,<3'"
SHINGLE, SIMILARITY, PERMUTATIONS = 5, 0.8, 128
OVERLAP = 13
BOILERPLATE = 10  # a sequence that more questions share is an instruction, not a question
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: 2**64 over the golden ratio, as in Fibonacci hashing


def check_datasketch() -> None:
    """Raise `ConfigError` if datasketch is not installed."""
    if importlib.util.find_spec("datasketch") is None:
        raise ConfigError(f"--stats needs datasketch, which is not installed: {INSTALL}")


def word_hashes(text: str) -> np.ndarray:
    """A hash of each word, uint64 [words]."""
    return np.fromiter(map(xxh3_64_intdigest, map(str.encode, _WORD.findall(text.lower()))), np.uint64)


def sequence_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """The distinct hashes of all sequences of so many words, sorted; a shorter text is one sequence."""
    length = min(length, len(words))
    hashes = np.zeros(len(words) - length + 1 if length else 0, np.uint64)
    for offset in range(length):
        hashes = (hashes ^ words[offset : offset + len(hashes)]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


class NearDuplicates:
    """Finds for each text an earlier one that is nearly the same.

    Only texts without such an earlier one are compared with later ones, so that a thousand copies cost a thousand
    comparisons.
    """

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
        self._empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        self._signatures: dict[Any, Any] = {}

    def first_like(self, text: np.ndarray, key: Any) -> tuple[Any, float] | None:
        """The key of the earlier text that is most like this one (its word hashes), and their similarity."""
        if not len(text):
            return None
        signature = self._empty.copy()
        signature.update_batch((sequence_hashes(text, SHINGLE) >> np.uint64(32)).tolist())
        values = signature.hashvalues
        similar = [(float(np.mean(self._signatures[key] == values)), key) for key in self._index.query(signature)]
        similarity, earlier = max(similar, default=(0.0, key))
        if similarity >= SIMILARITY:
            return earlier, similarity
        self._index.insert(key, signature, check_duplication=False)
        self._signatures[key] = values
        return None


class QuestionIndex:
    """Finds the questions of benchmarks in texts; `first_place` is where the data contains one first, by its number.

    Questions of fewer words than `OVERLAP` are not looked for; `names` has the benchmark of each of the others.
    """

    def __init__(self, benchmarks: Mapping[str, Sequence[str]]) -> None:
        self.names: list[str] = []
        self.first_place: dict[int, str] = {}
        sequences, questions = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for name, texts in benchmarks.items():
            for words in map(word_hashes, texts):
                if len(words) >= OVERLAP:
                    sequences.append(sequence_hashes(words, OVERLAP))
                    questions.append(np.full(len(sequences[-1]), len(self.names)))
                    self.names.append(name)
        every, of_question = np.concatenate(sequences), np.concatenate(questions)
        _, number, counts = np.unique(every, return_inverse=True, return_counts=True)
        is_own = counts[number] <= BOILERPLATE
        order = np.argsort(every[is_own], kind="stable")
        self._sequences, self._questions = every[is_own][order], of_question[is_own][order]

    def add(self, text: np.ndarray, place: str) -> None:
        """Look for the questions in the text with these word hashes."""
        if len(text) < OVERLAP or not len(self._sequences):
            return
        sequences = sequence_hashes(text, OVERLAP)
        begins, ends = (np.searchsorted(self._sequences, sequences, side) for side in ("left", "right"))
        for index in np.flatnonzero(ends > begins):
            for question in self._questions[begins[index] : ends[index]]:
                self.first_place.setdefault(int(question), place)
