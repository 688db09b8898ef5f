"""What is written and shown when a run fails: the record, the likely cause, the page.

Only the standard library is imported: a small process that watches the ranks, without site-packages, uses it too.
"""

from __future__ import annotations

from finetune.diagnostics.causes import Cause, likely_cause
from finetune.diagnostics.failure_page import page
from finetune.diagnostics.failure_record import KINDS, PHASES, Failure
from finetune.diagnostics.failure_store import FILE, read, write
from finetune.diagnostics.failure_text import one_line
from finetune.diagnostics.first_failure import first_of, is_echo

__all__ = [
    "FILE",
    "KINDS",
    "PHASES",
    "Cause",
    "Failure",
    "first_of",
    "is_echo",
    "likely_cause",
    "one_line",
    "page",
    "read",
    "write",
]
