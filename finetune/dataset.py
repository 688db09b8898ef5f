"""Conversations -> the examples of a run, a ledger of every row that was not kept whole, and a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.conversations import Conversation
from finetune.errors import DataError, listed
from finetune.rendering import Example, Renderer, Rendering

SECONDS_BEFORE_A_BAR = 2.0


@dataclass(frozen=True)
class Summary:
    """Counts over one data set; tokens are those of the examples, supervised ones those that are learned."""

    rows: int
    kept: int
    cut: int
    dropped: int
    examples: int
    tokens: int
    supervised_tokens: int
    longest: int

    @property
    def supervised_share(self) -> float:
        """Learned tokens over all tokens, 0 to 1."""
        return self.supervised_tokens / self.tokens


@dataclass(frozen=True)
class PreparedData:
    """What training needs, and what the user must be able to read about it."""

    examples: list[Example]
    ledger: list[dict[str, Any]]
    summary: Summary


def render_all(
    conversations: Sequence[Conversation], renderer: Renderer, *, show_progress: bool = True
) -> list[Rendering]:
    """Render every conversation, in order.

    Raises:
        DataError: every conversation that the format cannot express, the first 20 shown.
    """
    renderings, faults = [], []
    bar = tqdm(conversations, "rendering", unit=" rows", disable=not show_progress, delay=SECONDS_BEFORE_A_BAR)
    for conversation in bar:
        try:
            renderings.append(renderer.render(conversation))
        except DataError as fault:
            faults.append(str(fault))
    if faults:
        raise DataError(listed(faults, "conversation that cannot be rendered"))
    return renderings


def prepare(renderings: Sequence[Rendering], source: str) -> PreparedData:
    """Gather the examples, the ledger lines and the counts.

    Raises:
        DataError: no example is left.
    """
    examples = [example for rendering in renderings for example in rendering.examples]
    if not examples:
        raise DataError(
            f"{source}: all {len(renderings):,} rows are dropped: raise --model_max_length, or shorten them"
        )
    statuses = Counter(rendering.status for rendering in renderings)
    summary = Summary(
        rows=len(renderings),
        kept=statuses["kept"],
        cut=statuses["cut"],
        dropped=statuses["dropped"],
        examples=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        supervised_tokens=sum(example.num_supervised for example in examples),
        longest=max(len(example.input_ids) for example in examples),
    )
    ledger = [
        {"source": source, "row": one.row, "id": one.id, "status": one.status, "reason": one.reason}
        for one in renderings
        if one.reason is not None
    ]
    return PreparedData(examples, ledger, summary)


def write_ledger(path: Path, ledger: Iterable[dict[str, Any]]) -> None:
    """One JSON line per row that was not kept whole and as it stood."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in ledger]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def as_features(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """What the collator takes, one mapping per example."""
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]


def summary_facts(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON values."""
    return {**asdict(summary), "supervised_share": round(summary.supervised_share, 4)}
