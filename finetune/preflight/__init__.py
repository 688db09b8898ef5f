"""What would go wrong with a run, found before it: `finetune doctor` is made of this."""

from finetune.preflight.findings import SECTIONS, Examination, Finding

__all__ = ["SECTIONS", "Examination", "Finding"]
