"""Ranks that watch themselves and each other: deaths, hangs, hosts that never arrive, requests to stop."""

from finetune.distributed.watchdog.launcher_processes import (
    runner_arguments,
    world_info_of,
)
from finetune.distributed.watchdog.watchdog_client import (
    launcher_pid,
    report_phase,
    set_output_dir,
    set_timeouts,
    start_watchdog,
)

__all__ = [
    "set_output_dir",
    "start_watchdog",
    "launcher_pid",
    "set_timeouts",
    "report_phase",
    "runner_arguments",
    "world_info_of",
]
