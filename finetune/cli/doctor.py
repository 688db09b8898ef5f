"""`finetune doctor`: will this run, will it fit, and what would go wrong, in the place of the command that starts it.

    finetune doctor --hostfile=hostfiles/two_hosts --model_name_or_path M --data_path D --output_dir output ...

Hosts are asked first, because their hardware decides; then flags, data, memory and disk are examined as the run itself
would, and at last the ways between the hosts. The exit status is that which the run would end with.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from finetune.config import Arguments, DoctorArguments, parse, split_command
from finetune.config import build_parser as training_parser
from finetune.distributed.process_setup import prepare_environment
from finetune.launcher import LauncherArgs, parse_launcher_args, redact, restarts
from finetune.preflight import DoctorReport, PlannedRun, print_report
from finetune.training.start_checks import PlannedRanks, check_start
from finetune.utils.console import accept_all_characters, configure_logging, quiet_libraries
from finetune.utils.options import CommandParser, fill


def build_parser() -> CommandParser:
    """Build the parser of the flags of `finetune doctor` itself."""
    return CommandParser(
        "finetune doctor",
        "[RECIPE.yaml] FLAGS OF finetune train [--json] [--full] [--write_env] [--stage] [--rehearse]",
        DoctorArguments,
        description="Check whether a run will start and fit, and what would go wrong. Takes the command line of the "
        "training, with `doctor` in the place of `train`. Ends with the status the run would end with.",
    )


def parse_options(argv: Sequence[str]) -> tuple[DoctorArguments, LauncherArgs, list[str]]:
    """Return the own flags, those of the launcher, and the words of the training command, which are not looked at."""
    own_names = {"h", "help", *(declared.name for declared in fields(DoctorArguments))}
    ours, launcher, training = split_command(argv, training_parser().types, own_names)
    chosen = fill(DoctorArguments, build_parser().parse(ours))
    return chosen, parse_launcher_args([*launcher, "finetune.py"], supervised=True), training


def main(argv: Sequence[str]) -> None:
    """Examine the run, print the findings, and exit with the status that the run would end with."""
    choice, flags, words = parse_options(argv)
    configure_logging(to_stderr=True, prefix="doctor: ")
    accept_all_characters(utf8=choice.json)
    prepare_environment()
    report = DoctorReport()
    arguments = report.attempt("command", lambda: parse(words, vars(choice)))
    run = arguments and report.attempt("command", lambda: _plan_run(choice, flags, words, arguments))
    if run:
        report.attempt("configuration", lambda: _check_start(run))
    if run and not report.status:
        from finetune.preflight.examination import examine_run  # they need torch; a mistake costs a second
        from finetune.train import resolve

        quiet_libraries()
        examine_run(report, run, resolve)
    if choice.json:
        print(json.dumps(as_json(report), ensure_ascii=False, indent=1), flush=True)
    else:
        print_report(report, shlex.join(redact(run.command())) if run else "")
    sys.exit(report.status)


def _check_start(run: PlannedRun) -> None:
    planned = PlannedRanks.of_launch(run.flags, None, use_cpu=run.use_cpu) if run.slots is None else None
    check_start(run.arguments, planned, is_launch=True)


def _plan_run(choice: DoctorArguments, flags: LauncherArgs, words: list[str], arguments: Arguments) -> PlannedRun:
    resources = restarts.resources_of_first_start(flags)
    return PlannedRun(choice, flags, resources.slots if resources else None, words, arguments)


def as_json(report: DoctorReport) -> dict[str, Any]:
    """For scripts: `status`, `findings`, and the facts of each section."""
    sections = {
        name.replace(" ", "_"): {key: value for key, value in facts.items() if key != "lines"}
        for name, facts in report.facts.items()
    }
    return {"status": report.status, "findings": [asdict(finding) for finding in report.findings], **sections}
