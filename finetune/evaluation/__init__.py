"""Is it better? A result beside its base, on held-out conversations."""

from __future__ import annotations

from finetune.evaluation.stored import (
    HELD_OUT_FILE,
    Row,
    Section,
    Table,
    sections,
)

__all__ = ["HELD_OUT_FILE", "Row", "Section", "Table", "sections"]
