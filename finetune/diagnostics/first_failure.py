"""Find the first of several failures: when one rank fails, the others fail in their collective operations with it."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from finetune.diagnostics.failure_record import Failure

# Clocks of hosts differ, and the end of a rank is noticed at once.
SECONDS_TOGETHER = 1.5

# Messages of gloo, NCCL, torch's store and pipes on a rank whose peer is gone.
PEER_IS_GONE = "|".join(
    (
        r"connection (was )?(likely )?(closed|reset|aborted)",
        r"(closed|reset) by (remote )?peer",
        r"broken pipe|\bEPIPE\b|\bECONNRESET\b",
        r"(socket|recv|send|wait) time(d )?out|timed out waiting \d+ ?ms for (recv|send)",
        r"failed to (recv|send), (got|sent) 0 bytes",
        r"remote (worker|server|process) (hanging|shutdown|exited|has exited)",
        r"remote process exited|ncclRemoteError|ncclInternalError.*(recv|send)",
        r"(recvValue|sendBytes|recvVector|doWait|waitForInput).{0,40}(failed|timed out)",
        r"wait timeout after \d+ ?ms, keys",
        r"\bwork\b.{0,80}\b(was|were|been) aborted|NCCL communicator (was|has been) aborted|ncclCommAbort",
        r"process group (was|has been) (aborted|destroyed)",
        r"watchdog (thread )?(caught|got|terminated|hit).*(time|abort)",
        r"(ranks?|peers?) .{0,60}(failed to pass monitoredBarrier|successfully reached monitoredBarrier, but)",
        r"pair\.cc:\d+\].*(error|closed)",
    )
)
# Downloads fail with the same messages, and no rank is the reason.
DOWNLOAD = r"HTTPS?Connection|huggingface|urllib3?\b|requests\.exceptions"
# The stack of a rank that waits for the others ends in one of these.
COLLECTIVE = r"distributed_c10d\.py|deepspeed/comm/"


def find_first_failure(failures: Sequence[Failure]) -> Failure:
    """Return the failure from which the others follow.

    Of the failures within about a second of the earliest, it is the first that is not secondary, or the earliest if
    all are. A failure without a date counts as the latest.
    """
    if not failures:
        raise ValueError("there are no failures to choose from")
    ordered = sorted(failures, key=Failure.timestamp)
    latest = ordered[0].timestamp() + SECONDS_TOGETHER
    return next((each for each in ordered if each.timestamp() <= latest and not is_secondary(each)), ordered[0])


def is_secondary(failure: Failure) -> bool:
    """Return whether a failure follows from that of another rank.

    Its message says that a peer is gone, SIGTERM of the launcher ended it, or it waits in a collective operation.
    """
    if failure.kind in ("died", "launcher"):
        return failure.killed_by() == signal.SIGTERM
    if failure.kind == "stuck":
        return re.search(COLLECTIVE, failure.traceback) is not None
    message = failure.error or failure.traceback[-2000:]
    if failure.kind != "exception" or re.search(DOWNLOAD, message, re.IGNORECASE):
        return False
    return re.search(PEER_IS_GONE, message, re.IGNORECASE) is not None
