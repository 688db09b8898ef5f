"""What is written and shown when a run fails: the record, the likely cause, the page.

Only the standard library is imported: a small process that watches the ranks, without site-packages, uses it too.
"""

from __future__ import annotations

from finetune.failures.causes import Cause, likely_cause
from finetune.failures.echoes import first_of, is_echo
from finetune.failures.page import page
from finetune.failures.record import KINDS, PHASES, Failure
from finetune.failures.stored import FILE, read, write
from finetune.failures.words import one_line

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
