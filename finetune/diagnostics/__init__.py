"""Failures of a run: the record, the first of several, its likely cause, the page that the user reads.

Only the standard library is imported, because the watchdog processes use this package, too. The table of known causes
alone needs PyYAML, which is imported when the table is read.
"""

from finetune.diagnostics.causes import find_first_failure, is_secondary, likely_cause, load_known_causes
from finetune.diagnostics.failure_page import format_failure_page, summarize_failure
from finetune.diagnostics.failure_record import KINDS, PHASES, Failure
from finetune.diagnostics.failure_store import FAILURE_FILE, read_failure, write_failure
