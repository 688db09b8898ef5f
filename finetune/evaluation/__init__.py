"""Is it better? A result beside its base: on held-out conversations, on benchmarks, and on what the base could do."""

from __future__ import annotations

from finetune.evaluation.stored import (
    BENCHMARKS_FILE,
    FILES,
    FORGETTING_FILE,
    HELD_OUT_FILE,
    Row,
    Section,
    Table,
    sections,
)

__all__ = ["BENCHMARKS_FILE", "FILES", "FORGETTING_FILE", "HELD_OUT_FILE", "Row", "Section", "Table", "sections"]
