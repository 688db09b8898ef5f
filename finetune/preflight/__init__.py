"""What would go wrong with a run, found before it: `finetune doctor` is made of this."""

from finetune.preflight.examining import examine_run
from finetune.preflight.findings import SECTIONS, Examination, Finding
from finetune.preflight.planned import PlannedRun, plan_run
from finetune.preflight.showing import show

__all__ = ["SECTIONS", "Examination", "Finding", "PlannedRun", "examine_run", "plan_run", "show"]
