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
from typing import Any

from finetune.config import parse_for_doctor
from finetune.distributed.process_setup import prepare_environment
from finetune.launcher import redact
from finetune.utils.console import quiet_libraries


def main(argv: Sequence[str]) -> None:
    """Examine, show, leave with the status that the run would end with.

    Raises:
        ConfigError: flags of the doctor or of the launcher that cannot be read.
    """
    choice, flags, words = parse_for_doctor(argv)
    prepare_environment()
    from finetune.preflight import DoctorReport, examine_run, plan_run, print_report  # they need torch; --help does not

    examination = DoctorReport()
    run = examination.attempt("command", lambda: plan_run(choice, flags, words))
    if run is not None:
        quiet_libraries()
        examine_run(examination, run, lambda line: print(f"doctor: {line}", file=sys.stderr, flush=True))
    if choice.json:
        print(json.dumps(as_json(examination), ensure_ascii=False, indent=1))
    else:
        print_report(examination, shlex.join(redact(run.command())) if run else "")
    sys.exit(examination.status)


def as_json(examination: Any) -> dict[str, Any]:
    """For scripts: `status`, `findings`, and the facts of each section."""
    sections = {
        name.replace(" ", "_"): {key: value for key, value in facts.items() if key != "lines"}
        for name, facts in examination.facts.items()
    }
    return {"status": examination.status, "findings": [one.facts() for one in examination.findings], **sections}
