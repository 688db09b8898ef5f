"""Preflight checks: the errors and warnings of a run before it starts, for `finetune doctor`."""

from finetune.preflight.doctor_report import SECTIONS, DoctorReport, print_report
from finetune.preflight.planned_run import PlannedRun
