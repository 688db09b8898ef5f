"""Is it better? A result beside its base: on held-out conversations, on benchmarks, and on what the base could do."""

from __future__ import annotations

from finetune.run_dir.eval_results import (
    BENCHMARKS_FILE,
    FILES,
    FORGETTING_FILE,
    HELD_OUT_FILE,
    ResultSection,
    ResultTable,
    TableRow,
    read_sections,
)

__all__ = [
    "BENCHMARKS_FILE",
    "FILES",
    "FORGETTING_FILE",
    "HELD_OUT_FILE",
    "TableRow",
    "ResultSection",
    "ResultTable",
    "read_sections",
]
