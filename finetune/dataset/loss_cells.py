"""Cells of the loss breakdown: each supervised token belongs to one source of the data and one answer.

The prepared data has the answer number of each supervised token; a cell is source index x `MAX_ANSWERS` + that number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_ANSWERS = 16  # the last one stands for all later ones, too
MAX_SOURCES = 32


class LossCells:
    """Numbers the cells of the supervised tokens; more than `MAX_SOURCES` sources are counted as one."""

    def __init__(self, sources: Sequence[str]) -> None:
        is_separate = len(sources) <= MAX_SOURCES
        self.sources = tuple(sources) if is_separate else ("all",)
        self._index = {name: index if is_separate else 0 for index, name in enumerate(sources)}

    def of(self, source: str, answer_numbers: np.ndarray) -> np.ndarray:
        """Cells of an example's supervised tokens, int64 [supervised]; `answer_numbers` ints [supervised]."""
        return self._index[source] * MAX_ANSWERS + answer_numbers.astype(np.int64)
