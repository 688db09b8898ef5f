"""Cells of the loss breakdown: each supervised token belongs to one source of the data and one model turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.chat_templates import supervised_turns_of
from finetune.conversation import answer_number

ANSWERS = 16  # the last one stands for all later ones, too
MOST_SOURCES = 32


class LossCells:
    """Numbers the learned tokens of examples.

    Args:
        sources: all that the data comes from, in order; too many to be told apart count as one.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        several = len(sources) <= MOST_SOURCES
        self.sources = tuple(sources) if several else ("all",)
        self._number = {name: number if several else 0 for number, name in enumerate(sources)}

    def of(self, table: Any) -> list[np.ndarray]:
        """The cell of each learned token, int64 [learned], example by example.

        Args:
            table: Arrow, with `source`, `labels` and `turn_spans` of the examples.
        """
        spans = table["turn_spans"].combine_chunks()
        fields = dict(zip((one.name for one in spans.values.type), spans.values.flatten(), strict=True))
        is_answer = np.array([role == "model" for role in fields["role"].to_pylist()], dtype=bool)
        answers = np.array([min(answer_number(turn), ANSWERS) for turn in fields["turn"].to_pylist()], dtype=np.int64)
        starts = fields["start"].to_numpy(zero_copy_only=False)
        bounds = spans.offsets.to_numpy() - spans.offsets[0].as_py()
        found = []
        for place, (source, labels) in enumerate(zip(table["source"].to_pylist(), table["labels"], strict=True)):
            own = slice(bounds[place], bounds[place + 1])
            mine = is_answer[own]
            learned = supervised_turns_of(labels.values.to_numpy(), answers[own][mine], starts[own][mine])
            found.append(self._number[source] * ANSWERS + learned - 1)
        return found
