"""Describe a failure in words: who failed, what happened, where in the run."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from finetune.diagnostics.failure_record import Failure

ASKED_TO_END = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
PHASE_TEXTS = {
    "start": "at the start",
    "data": "while preparing data",
    "rendezvous": "at the rendezvous",
    "model": "while loading the model",
    "evaluation": "in an evaluation",
    "save": "in a save",
    "end": "at the end",
}


def summarize_failure(failure: Failure) -> str:
    """Summarize a failure for `also` of another one: who failed, and the first line of its message.

    >>> summarize_failure(Failure("exception", "RuntimeError: Connection reset by peer", rank=1, host="node0"))
    'rank 1 on node0: RuntimeError: Connection reset by peer'
    """
    message = next((line.strip() for line in failure.error.splitlines() if line.strip()), "") or what_happened(failure)
    return f"{who_failed(failure)}: {message}"


def who_failed(failure: Failure) -> str:
    """Return `rank 3 on node1`, `ranks 4-7 on node1`, `host node1` or `the launcher`."""
    ranks = failure.ranks if failure.rank is None else (failure.rank,)
    hosts = failure.hosts if failure.host is None else (failure.host,)
    on_hosts = f" on {_first_of(hosts)}" if hosts else ""
    if failure.kind == "launcher":
        return f"the launcher{on_hosts}"
    if ranks and failure.kind != "lost":
        return f"rank{'s' * (len(ranks) > 1)} {_ranges(ranks)}{on_hosts}"
    return f"host{'s' * (len(hosts) > 1)} {_first_of(hosts)}" if hosts else "a rank"


def what_happened(failure: Failure) -> str:
    """Return the failure as a verb: `was killed (SIGKILL)`, `made no progress for 300 s`."""
    number = failure.killed_by()
    if failure.kind in ("died", "launcher") and number is not None:
        return f"{'was killed' if number in ASKED_TO_END else 'crashed'} ({signal.Signals(number).name})"
    seconds = None if failure.seconds is None else f"{failure.seconds:,.0f} s"
    return {
        "error": "stopped with an error",
        "exception": "stopped with an exception",
        "died": f"ended with status {failure.status} and without a message",
        "stuck": "made no progress" + (f" for {seconds}" if seconds else ""),
        "missing": "did not reach the rendezvous" + (f" within {seconds}" if seconds else ""),
        "lost": "can no longer be reached",
        "launcher": f"ended with status {failure.status}",
    }.get(failure.kind, "failed")


def where_in_run(failure: Failure) -> str:
    """Return `in step 120`, `in a save, step 120` or `while loading the model`; "" if unknown."""
    if failure.phase == "step" or (not failure.phase and failure.step is not None):
        return "in training" if failure.step is None else f"in step {failure.step:,}"
    step = f", step {failure.step:,}" if failure.step else ""
    return PHASE_TEXTS.get(failure.phase, f"in {failure.phase}" if failure.phase else "") + step


def _ranges(ranks: Sequence[int]) -> str:
    """Write (0, 1, 2, 5) as `0-2, 5`."""
    ranges: list[tuple[int, int]] = []
    for rank in sorted(set(ranks)):
        start = ranges.pop()[0] if ranges and ranges[-1][1] == rank - 1 else rank
        ranges.append((start, rank))
    return _first_of([str(start) if start == end else f"{start}-{end}" for start, end in ranges])


def _first_of(names: Sequence[str], count: int = 4) -> str:
    """Join the first names, with the number of the others."""
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
