"""What would go wrong with a run, found before it: `finetune doctor` is made of this."""

from finetune.preflight.doctor_output import print_report
from finetune.preflight.examination import examine_run
from finetune.preflight.findings import SECTIONS, DoctorReport, Finding
from finetune.preflight.planned_run import PlannedRun, plan_run

__all__ = ["SECTIONS", "DoctorReport", "Finding", "PlannedRun", "examine_run", "plan_run", "print_report"]
