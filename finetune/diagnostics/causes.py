"""Find the first of several failures, which the others follow, and its likely cause in the table of known causes."""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

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
KNOWN_CAUSES_FILE = Path(__file__).with_name("known_causes.yaml")
EXPLAINED_STATUSES = (2, 3, 4)


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


@dataclass(frozen=True)
class Cause:
    """A cause as the user reads it; `code` is a stable name, such as `gpu-out-of-memory`.

    A cause is only possible where other failures have the same message.
    """

    code: str
    title: str
    explanation: str
    remedy: str
    is_possible: bool = False

    @property
    def label(self) -> str:
        """How it is introduced."""
        return "Possible cause" if self.is_possible else "Likely cause"


@dataclass(frozen=True)
class KnownCause:
    """An entry of the table: a cause and its conditions, of which "" and () hold for every failure."""

    cause: Cause
    pattern: str  # regular expression for the texts of the failure, case ignored
    possible: str  # the same, for messages that other failures have, too
    unless: str  # the same, for texts that the cause does not fit
    stack: str  # regular expression for the whole traceback
    kinds: tuple[str, ...]  # values that the failure may have; phases and signals as well
    phases: tuple[str, ...]
    signals: tuple[int, ...]

    @classmethod
    def from_entry(cls, entry: dict[str, Any], phrases: dict[str, str]) -> KnownCause:
        """Build an entry from its YAML, with the phrases filled in."""
        explanation, remedy = (Template(entry[name]).substitute(phrases) for name in ("explanation", "remedy"))
        return cls(
            cause=Cause(entry["code"], entry["title"], explanation, remedy),
            **{
                field: "|".join(entry.get(key, ()))
                for field, key in (("pattern", "patterns"), ("possible", "possible_patterns"), ("unless", "unless"))
            },
            stack="|".join(entry.get("stack", ())),
            kinds=tuple(entry.get("kinds", ())),
            phases=tuple(entry.get("phases", ())),
            signals=tuple(entry.get("signals", ())),
        )

    @property
    def needs_text(self) -> bool:
        """Whether the entry looks for a message or a stack."""
        return bool(self.pattern or self.possible or self.stack)

    def find(self, failure: Failure, text: str) -> Cause | None:
        """Return the cause if all conditions hold for a failure with this text."""
        if not (
            (not self.kinds or failure.kind in self.kinds)
            and (not self.phases or failure.phase in self.phases)
            and (not self.signals or failure.killed_by() in self.signals)
            and (not self.stack or re.search(self.stack, failure.traceback) is not None)
        ):
            return None
        if self.unless and _matches(self.unless, text):
            return None
        if _matches(self.pattern, text) if self.pattern else not self.possible:
            return self.cause
        return replace(self.cause, is_possible=True) if self.possible and _matches(self.possible, text) else None


@functools.cache
def load_known_causes() -> tuple[KnownCause, ...]:
    """Read the table of known causes, once per process."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where libyaml is there
    table = yaml.load(KNOWN_CAUSES_FILE.read_text(encoding="utf-8"), loader)
    return tuple(KnownCause.from_entry(entry, table["phrases"]) for entry in table["causes"])


def likely_cause(failure: Failure) -> Cause | None:
    """Return the first known cause that fits, None if none does.

    Errors of the configuration, the data and checkpoints have none: they name place and remedy themselves, and quote
    rows and messages of libraries, which may contain any text. The message counts more than its traceback, which may
    contain errors that were handled: what only they say is possible. Causes that need no message come last.
    """
    if failure.kind == "error" and failure.status in EXPLAINED_STATUSES:
        return None
    message = "\n".join((_without_lines(failure.error, "frame #"), *failure.hints))
    # Frames and source lines contain arbitrary names.
    trace = f"{message}\n{_without_lines(failure.traceback, '  ', 'frame #', 'Traceback ')}"
    for text, needs_text in ((message, True), (trace, True), ("", False)):
        for known in load_known_causes():
            cause = known.find(failure, text) if known.needs_text == needs_text else None
            if cause is not None:
                return replace(cause, is_possible=True) if text is trace and failure.error else cause
    return None


def _matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE | re.MULTILINE) is not None


def _without_lines(text: str, *beginnings: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(beginnings))
