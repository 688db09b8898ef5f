"""The report as a file: on request, and at the end of a run, which must not fail because of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune.inference.run_result import read_result
from finetune.report.html_pages import REPORT, check_replaceable, write_page
from finetune.report.report_page import render_report
from finetune.report.run_reader import RunRecord, read_run
from finetune.report.sample_answers import generate_answers, prompts_of, reason_not_answered, write_answers
from finetune.utils.errors import FinetuneError

FILE = "report.html"
BYTES_TO_LEAVE = 64 << 20


def write_report(runs: Sequence[RunRecord], path: Path, *, every: float | None = None) -> None:
    """Write the page of these runs. An earlier report is replaced, no other file."""
    write_page(path, render_report(runs, every=every), REPORT)


def write_at_the_end(folder: Path, *, answers: int, seconds: float) -> str:
    """Write a run's report into its folder; return a line for the user.

    Up to `answers` prompts are answered in it, where memory and the given time allow.
    """
    path, note = folder / FILE, ""
    try:
        free = shutil.disk_usage(folder).free
        if free < BYTES_TO_LEAVE:  # checkpoints and the result need it more
            return f"no report was written: {free / 1e6:.0f} MB of disk are left: finetune report {folder} writes it"
        check_replaceable(path, REPORT)
        try:
            note = _answer(folder, answers, seconds) if answers else ""
        except (FinetuneError, OSError) as error:
            note = f"; no answers before and after: {error}"
        write_report([read_run(folder)], path)
    except (FinetuneError, OSError) as error:
        return f"no report was written: {error}"
    return f"{path}{note}"


def _answer(folder: Path, count: int, seconds: float) -> str:
    result = read_result(folder)
    prompts = prompts_of(read_run(folder).cards, count)
    if not prompts:
        return ""
    reason = reason_not_answered(result, seconds)
    if reason is not None:
        return f"; no answers before and after: {reason}: finetune report {folder} makes them"
    answers = generate_answers(result, prompts, seconds=seconds)
    write_answers(folder, result.run, answers)
    return f", with {len(answers.answered)} answers before and after"
