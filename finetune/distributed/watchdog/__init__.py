"""A watchdog process beside each rank: it finds dead, stuck and missing ranks, and names the first failure."""

from finetune.distributed.watchdog.watchdog_client import (
    released_watchdog,
    report_phase,
    set_output_dir,
    set_timeouts,
    start_watchdog,
)
