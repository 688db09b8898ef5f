"""The likely cause of a failure, looked up in the tables of what is known."""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune.diagnostics.failure_record import Failure
from finetune.diagnostics.failure_text import what_happened
from finetune.diagnostics.known import Known
from finetune.diagnostics.known.devices import DEVICES
from finetune.diagnostics.known.files import FILES
from finetune.diagnostics.known.hosts import HOSTS
from finetune.diagnostics.known.processes import BARE, OBSERVED
from finetune.diagnostics.known.software import SOFTWARE

DATA = 3  # the exit status

# From specific to general: what was observed beside the failure, what it says, what is left when it says nothing.
SPECIFIC: tuple[Known, ...] = (*OBSERVED, *FILES, *DEVICES, *SOFTWARE, *HOSTS)
KNOWN: tuple[Known, ...] = (*SPECIFIC, *BARE)


@dataclass(frozen=True)
class Cause:
    """What it probably was, why that happens, and what to type or change."""

    title: str
    why: str
    do: str


def likely_cause(failure: Failure) -> Cause | None:
    """The first known cause that fits, None where there is none.

    Faults of data have none: they name place and remedy themselves, and quote rows, which may say anything.
    What the error says counts more than what stands in its traceback, where a message may have been handled already.
    """
    if failure.kind == "error" and failure.status == DATA:
        return None
    said = "\n".join((_without(("frame #",), failure.error), *failure.hints))
    # frames and source lines name all kinds of things
    traced = f"{said}\n{_without(('  ', 'frame #', 'Traceback '), failure.traceback)}"
    for text, table in ((said, SPECIFIC), (traced, SPECIFIC), (what_happened(failure), BARE)):
        for known in table:
            if _fits(known, failure, text):
                return Cause(known.title, known.why, known.do)
    return None


def _fits(known: Known, failure: Failure, text: str) -> bool:
    """Whether all that an entry asks for holds."""
    return (
        (not known.kinds or failure.kind in known.kinds)
        and (not known.phases or failure.phase in known.phases)
        and (not known.signals or failure.killed_by() in known.signals)
        and (not known.seen or re.search(known.seen, text, re.IGNORECASE | re.MULTILINE) is not None)
        and (not known.stack or re.search(known.stack, failure.traceback) is not None)
    )


def _without(beginnings: tuple[str, ...], text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(beginnings))
