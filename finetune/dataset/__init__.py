"""Conversations -> the examples of a run on disk, a ledger of every row that was not kept whole, and a summary."""

from __future__ import annotations

from finetune.dataset.preparation import BadRows, PreparedData, check_usable, prepare
from finetune.dataset.summary import Summary

__all__ = ["BadRows", "PreparedData", "Summary", "check_usable", "prepare"]
