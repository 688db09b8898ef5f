"""A failure in words: who, what happened, where in the run."""

from __future__ import annotations

import signal as signals

from finetune.diagnostics.failure_record import Failure

WHERE = {
    "start": "at the start",
    "data": "while data was prepared",
    "meeting": "while the ranks met",
    "model": "while the model was loaded",
    "evaluation": "in an evaluation",
    "save": "in a save",
    "end": "at the end",
}


def one_line(failure: Failure) -> str:
    """For `also` of another failure: who, and the first line of what it said.

    >>> one_line(Failure("exception", "RuntimeError: Connection reset by peer", rank=1, host="node0"))
    'rank 1 on node0: RuntimeError: Connection reset by peer'
    """
    said = next((line.strip() for line in failure.error.splitlines() if line.strip()), "") or what_happened(failure)
    return f"{who(failure)}: {said}"


def who(failure: Failure) -> str:
    """`rank 3 on node1`, `ranks 4-7 on node1`, `host node1`, `the launcher`."""
    ranks = failure.ranks if failure.rank is None else (failure.rank,)
    hosts = failure.hosts if failure.host is None else (failure.host,)
    named = _few(hosts)
    if ranks and failure.kind not in ("launcher", "lost"):
        return f"rank{'s' * (len(ranks) > 1)} {_spans(ranks)}" + (f" on {named}" if hosts else "")
    if failure.kind == "launcher":
        return "the launcher" + (f" on {named}" if hosts else "")
    return f"host{'s' * (len(hosts) > 1)} {named}" if hosts else "a rank" if failure.kind != "stopped" else "it"


def what_happened(failure: Failure) -> str:
    """The failure as a verb: `was killed (SIGKILL)`, `made no progress for 300 s`."""
    number = failure.killed_by()
    if failure.kind in ("died", "launcher") and number is not None:
        return f"{'was killed' if number in (1, 2, 9, 15) else 'crashed'} ({signals.Signals(number).name})"
    waited = f" for {failure.seconds:,.0f} s" if failure.seconds is not None else ""
    return {
        "error": "stopped with an error",
        "exception": "stopped with an exception",
        "died": f"ended with status {failure.status} and without a word",
        "stuck": f"made no progress{waited}",
        "missing": f"did not come to where the ranks meet{' within' * bool(waited)}{waited.removeprefix(' for')}",
        "lost": "can no longer be reached",
        "launcher": f"ended with status {failure.status}",
        "stopped": "was asked to stop",
    }.get(failure.kind, "failed")


def where_in_the_run(failure: Failure) -> str:
    """`in step 120`, `in a save, step 120`, `while the ranks met`; "" where it is not known."""
    if failure.phase == "step" or (not failure.phase and failure.step is not None):
        return "in training" if failure.step is None else f"in step {failure.step:,}"
    after = f", step {failure.step:,}" if failure.step else ""
    return WHERE.get(failure.phase, f"in {failure.phase}" if failure.phase else "") + after


def _spans(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) as `0-2, 5`; the first few of many."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return _few(tuple(str(low) if low == high else f"{low}-{high}" for low, high in spans))


def _few(names: tuple[str, ...], count: int = 4) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
