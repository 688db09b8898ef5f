"""A report as one self-contained HTML document: style, numbers, plotly.js and two short scripts of ours.

The policy of the page lets exactly these scripts run, by their hashes, and forbids every request. Numbers and names
travel as JSON in an element that is never run. All other text is escaped.
"""

import json
import shutil
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from finetune.diagnostics import likely_cause
from finetune.inference.run_result import read_result
from finetune.report import report_tables, run_outcome
from finetune.report.curves import plot_data
from finetune.report.html_pages import REPORT, asset, check_replaceable, render, render_page, write_page
from finetune.report.run_reader import RunRecord, read_run
from finetune.report.sample_answers import generate_answers, prompts_of, reason_not_answered, write_answers
from finetune.run_dir.run_json import RUN_FILE
from finetune.utils.errors import ConfigError, FinetuneError
from finetune.utils.user_files import MALFORMED

PARTS = ("head", "answers", "body")


def render_report(runs: Sequence[RunRecord], *, every: float | None = None) -> str:
    """Return the page of one run, or of several compared.

    Args:
        every: seconds after which a page of `live_server` asks it for changes; None: a file, which stays as it is.
    """
    parts, numbers = render_state(runs)
    return render_page(
        "report.html",
        title=title(runs),
        parts=parts,
        generator=REPORT,
        policy="; img-src data: blob:" + ("" if every is None else "; connect-src 'self'"),
        style=asset("base.css") + asset("report.css"),
        numbers=as_script_data(numbers),
        scripts=(plotly_script(), asset("report.js")),
        every=every,
    )


def render_state(runs: Sequence[RunRecord]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what changes during a run: the HTML around the plots by name, and the numbers of the plots."""
    try:
        values = {
            "runs": runs,
            "title": title(runs),
            "facts": report_tables,
            "outcome": run_outcome,
            "likely_cause": likely_cause,
            "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            "answers": report_tables.answers(runs),
            "differing": report_tables.differences(runs) if len(runs) > 1 else [],
        }
        return {name: render(f"report_{name}.html", **values) for name in PARTS}, plot_data(runs)
    except (*MALFORMED, UndefinedError) as error:
        files = ", ".join(str(run.folder / RUN_FILE) for run in runs)
        reason = repr(error)[:200]
        raise ConfigError(f"{files}: is not as this version writes it: {reason}: restore the file") from error


def title(runs: Sequence[RunRecord]) -> str:
    """Return the name of the run, or those of all."""
    return runs[0].name if len(runs) == 1 else " \N{MULTIPLICATION SIGN} ".join(run.name for run in runs)


def as_script_data(values: Any) -> str:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def plotly_script() -> str:
    """Return plotly.js from the Python package, without importing the package."""
    spec = find_spec("plotly")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / "package_data" / "plotly.min.js" if places else None
    if path is None or not path.is_file():
        raise ConfigError("plotly is not installed, the report draws with it: pip install plotly")
    return path.read_text(encoding="utf-8")


FILE = "report.html"
BYTES_TO_LEAVE = 64 << 20


def write_report(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page of these runs. An earlier report is replaced, no other file."""
    write_page(path, render_report(runs), REPORT)


def write_at_the_end(folder: Path, *, answers: int, seconds: float, trusts_code: bool = False) -> str:
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
            note = _answer(folder, answers, seconds, trusts_code) if answers else ""
        except (FinetuneError, OSError) as error:
            note = f"; no answers before and after: {error}"
        write_report([read_run(folder)], path)
    except (FinetuneError, OSError) as error:
        return f"no report was written: {error}"
    return f"{path}{note}"


def _answer(folder: Path, count: int, seconds: float, trusts_code: bool) -> str:
    result = read_result(folder, trust_remote_code=trusts_code)
    prompts = prompts_of(read_run(folder).cards, count)
    if not prompts:
        return ""
    reason = reason_not_answered(result, seconds)
    if reason is not None:
        return f"; no answers before and after: {reason}: finetune report {folder} makes them"
    answers = generate_answers(result, prompts, seconds=seconds)
    write_answers(folder, result.run, answers)
    return f", with {len(answers.answered)} answers before and after"
