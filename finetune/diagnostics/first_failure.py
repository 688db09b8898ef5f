"""Which of several failures was the first: when one rank dies, the others fail in what they did together with it."""

from __future__ import annotations

import re
import signal

from finetune.diagnostics.failure_record import Failure, moment

SECONDS_OF_ECHO = 1.5

# What gloo, NCCL, torch's store and pipes say on a rank whose partner is gone.
_ECHOES = (
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
_ECHO = "|".join(_ECHOES)
# Downloads break off with the same words, and no rank is to blame.
_DOWNLOAD = r"HTTPS?Connection|huggingface|urllib3?\b|requests\.exceptions"
# Where a rank waits for the others, its stack ends in here.
_COLLECTIVE = r"distributed_c10d\.py|deepspeed/comm/"


def first_of(failures: list[Failure]) -> Failure:
    """The failure that the others follow from.

    Of those within about a second of the earliest (hosts' clocks differ, and a death is heard of at once) it is the
    first that is no echo; where all are, the earliest. Failures without a date count as late.

    Raises:
        ValueError: there are none.
    """
    if not failures:
        raise ValueError("there are no failures to choose from")
    ordered = sorted(failures, key=moment)
    near = [one for one in ordered if moment(one) <= moment(ordered[0]) + SECONDS_OF_ECHO]
    return next((one for one in near if not is_echo(one)), ordered[0])


def is_echo(failure: Failure) -> bool:
    """Whether another rank's death brought it about: it says so; or a launcher that saw another rank end sent it
    SIGTERM; or it waits in a collective."""
    if failure.kind in ("died", "launcher") and failure.killed_by() == signal.SIGTERM:
        return True
    if failure.kind == "stuck":
        return re.search(_COLLECTIVE, failure.traceback) is not None
    said = failure.error or failure.traceback[-2000:]
    sounds_like_one = re.search(_ECHO, said, re.IGNORECASE) and not re.search(_DOWNLOAD, said, re.IGNORECASE)
    return failure.kind == "exception" and bool(sounds_like_one)
