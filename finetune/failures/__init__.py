"""Runs that fail: what is recorded, what is shown, what is known of such failures. The standard library alone."""

from finetune.failures.causes import likely_cause
from finetune.failures.page import page, write
from finetune.failures.record import FILE, Failure, first_of, is_consequence, read

__all__ = ["FILE", "Failure", "first_of", "is_consequence", "likely_cause", "page", "read", "write"]
