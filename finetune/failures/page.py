"""What a failed run leaves for people: one page on the terminal, `failure.json` in its folder."""

from __future__ import annotations

import textwrap
from pathlib import Path

from finetune.failures import record
from finetune.failures.causes import likely_cause
from finetune.failures.record import Failure

ERROR_LINES, OTHERS = 6, 3
WIDTH = 100
GO_ON = "start the same command again with --resume_from_checkpoint auto"


def write(folder: Path, failure: Failure) -> Path | None:
    """Leave `failure.json`, with the likely cause and the next step; None where the disk refuses."""
    cause = likely_cause(failure)
    return record.write(
        folder, failure, {"cause": cause.title if cause else None, "next": cause.do if cause else GO_ON}
    )


def page(failure: Failure, *, colour: bool = False) -> str:
    """At most a screen: what failed, where, why, what to do."""
    cause = likely_cause(failure)
    red, plain = ("\033[1;31m", "\033[0m") if colour else ("", "")
    facts = {
        "what": "\n".join(failure.error.strip().splitlines()[:ERROR_LINES]),
        "where": _where(failure),
        "also": "\n".join(line[: WIDTH + 20] for line in failure.also[:OTHERS])
        + (f"\n... and {len(failure.also) - OTHERS} more" if len(failure.also) > OTHERS else ""),
        "likely": cause.title if cause else "",
        "to do": cause.do if cause else "",
        "then": GO_ON if failure.phase in ("step", "save", "end") else "",
    }
    lines = [f"{red}The run failed{plain}"]
    for label, text in facts.items():
        for number, line in enumerate(_wrapped(text)):
            lines.append(f"  {label if number == 0 else '':<8}{line}")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    parts = [textwrap.wrap(line, WIDTH - 10, break_on_hyphens=False) for line in text.splitlines()]
    return [line for part in parts for line in part][: 2 * ERROR_LINES]


def _where(failure: Failure) -> str:
    parts = []
    if failure.rank is not None:
        parts.append(f"rank {failure.rank}")
    elif failure.ranks:
        shown = ", ".join(map(str, failure.ranks[:8])) + (", ..." if len(failure.ranks) > 8 else "")
        parts.append(f"ranks {shown}")
    if failure.host or failure.hosts:
        parts.append("on " + (failure.host or ", ".join(failure.hosts[:8])))
    if failure.phase == "step":
        parts.append(f"in step {failure.step}")
    elif failure.phase == "save":
        parts.append(f"while saving in step {failure.step}")
    elif failure.phase:
        parts.append(f"({failure.phase})")
    return " ".join(parts)
