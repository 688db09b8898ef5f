"""Ranks that watch themselves and each other: deaths, hangs, hosts that never arrive, requests to stop."""

from finetune.guard.launcher import command_of, die_with_parent, parent_of, runner_arguments, stat_of, world_of
from finetune.guard.rank import belongs_to, guarded, launcher, limits, phase

__all__ = [
    "belongs_to",
    "command_of",
    "die_with_parent",
    "guarded",
    "launcher",
    "limits",
    "parent_of",
    "phase",
    "runner_arguments",
    "stat_of",
    "world_of",
]
