"""Preflight checks: the errors and warnings of a run before it starts, for `finetune doctor`."""

from finetune.preflight.doctor_output import print_report
from finetune.preflight.examination import examine_run
from finetune.preflight.findings import SECTIONS, DoctorReport
from finetune.preflight.planned_run import PlannedRun
