"""`finetune train --max_restarts N`: whether a run that ended is started again, on which hosts, and when.

A restart resumes from the newest complete checkpoint. A host that failed is replaced by a spare of the hostfile
(`node7 slots=8 spare`).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.diagnostics import Failure, likely_cause
from finetune.distributed.stop_requests import EXIT_STOPPED, STOP_FILE
from finetune.launcher.deepspeed_args import LauncherArgs
from finetune.launcher.hostfile import Resources, resolve_resources
from finetune.utils.errors import ConfigError, lines_of
from finetune.utils.options import without_flags

FIRST_WAIT, LONGEST_WAIT = 5.0, 300.0  # seconds; each wait is twice the one before
KINDS = ("died", "stuck", "missing", "lost", "launcher")
# Causes of exceptions that another attempt, or another host, may not have.
TRANSIENT = {"gpu-hardware-error", "gpu-kernel-failed", "nccl-system-error", "collective-timeout", "peer-failed",
             "rendezvous-failed", "port-in-use", "hub-unreachable"}  # fmt: skip
RESTART = "FINETUNE_RESTART"  # JSON for run.json: `cause` and `ended` of the start before
REPLACED_FLAGS = ("--resume_from_checkpoint", "--overwrite_output_dir")


def cause_of(status: int, failure: Failure | None, output_dir: Path) -> str | None:
    """Return why the run ended, if another start may help; None if it is complete or was asked to stop."""
    if status == EXIT_STOPPED:
        return None if (output_dir / STOP_FILE).exists() else "preempted (status 75)"
    if failure is None or failure.kind == "error" or 2 <= status <= 6:
        return None
    cause = likely_cause(failure)
    if failure.kind in KINDS or (cause is not None and cause.code in TRANSIENT):
        return lines_of(failure.error, failure.kind)[0]
    return None


def failed_host(failure: Failure | None, resources: Resources) -> str | None:
    """Return the host that failed, as the hostfile names it; None if no single one did."""
    if failure is None or failure.kind == "launcher":
        return None
    of_ranks = [host for host, ids in resources.slots.items() for _ in ids]
    ranks = failure.ranks if failure.kind == "missing" else [failure.rank] if failure.rank is not None else []
    hosts = {of_ranks[rank] for rank in ranks if rank < len(of_ranks)} or {str(failure.host), *failure.hosts} - {"None"}
    return next(iter(hosts)) if len(hosts) == 1 and hosts <= resources.slots.keys() else None


def resources_of_first_start(flags: LauncherArgs) -> Resources | None:
    """Return the hosts of the first start, without spares; None for this machine alone.

    Raises:
        ConfigError: there are spares, and a filter leaves out the first slots of a host.
    """
    resources = resolve_resources(flags)
    if resources is None or not resources.spares:
        return resources
    if len(resources.spares) == len(resources.slots):
        raise ConfigError(f"{resources.path}: every host is a spare: take the word off those that train first")
    if any(ids != list(range(len(ids))) for ids in resources.slots.values()):
        raise ConfigError(
            f"{resources.path} has spares: --include and --exclude may leave out last slots of a host only"
        )
    return _using(resources, {host: ids for host, ids in resources.slots.items() if host not in resources.spares})


def without_host(resources: Resources, host: str, *, may_shrink: bool) -> Resources:
    """Replace a host by a spare with enough slots; without one leave it out if the run may have fewer ranks.

    If it may not, the host becomes the last spare: it may be up again when the next one fails.
    """
    needed = len(resources.slots[host])
    spare = next((name for name, count in resources.spares.items() if count >= needed), None)
    if spare is None and (not may_shrink or len(resources.slots) == 1):
        return resources
    slots = {(spare or "") if name == host else name: ids for name, ids in resources.slots.items()}
    slots.pop("", None)
    left = {name: count for name, count in resources.spares.items() if name != spare}
    left |= {} if may_shrink else {host: needed}
    return _using(replace(resources, spares=left), slots)


def _using(resources: Resources, slots: dict[str, list[int]]) -> Resources:
    return replace(resources, slots=slots, pool={host: len(ids) for host, ids in slots.items()})


def seconds_to_wait(restarts: int) -> float:
    """Return how long to wait before a restart; `restarts` were made before."""
    return min(FIRST_WAIT * 2**restarts, LONGEST_WAIT)


def resuming(words: Sequence[str]) -> list[str]:
    """Return the training's words, with --resume_from_checkpoint auto in place of what the first start was told."""
    return [*without_flags(words, REPLACED_FLAGS), "--resume_from_checkpoint", "auto"]


def variables(cause: str) -> dict[str, str]:
    """Return the variables that tell the ranks why they are started again."""
    return {RESTART: json.dumps({"cause": cause, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")})}
