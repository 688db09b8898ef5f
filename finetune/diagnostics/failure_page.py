"""Describe a failure in words, and show it on one page of plain text, for a terminal or a log."""

import re
import signal
import textwrap
from collections.abc import Sequence
from unicodedata import east_asian_width

from finetune.diagnostics.causes import likely_cause
from finetune.diagnostics.failure_record import Failure
from finetune.utils.errors import format_names, lines_of

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
HEADLINE_LINES, ERROR_LINES, CAUSE_LINES, REMEDY_LINES, ALSO_LINES = 2, 6, 4, 5, 3
MIN_WIDTH = 60
FRAME = re.compile(r"Traceback|\s*File \"|\s*[\^~]+\s*$|frame #\d|\s+raise |Exception raised from")


def summarize_failure(failure: Failure) -> str:
    """Summarize a failure for `also` of another one: who failed, and the first line of its message.

    >>> summarize_failure(Failure("exception", "RuntimeError: Connection reset by peer", rank=1, host="node0"))
    'rank 1 on node0: RuntimeError: Connection reset by peer'
    """
    return f"{who_failed(failure)}: {lines_of(failure.error, what_happened(failure))[0]}"


def who_failed(failure: Failure) -> str:
    """Return `rank 3 on node1`, `ranks 4-7 on node1`, `host node1` or `the launcher`."""
    ranks = failure.ranks if failure.rank is None else (failure.rank,)
    hosts = failure.hosts if failure.host is None else (failure.host,)
    on_hosts = f" on {format_names(hosts)}" if hosts else ""
    if failure.kind == "launcher":
        return f"the launcher{on_hosts}"
    if ranks and failure.kind != "lost":
        return f"rank{'s' * (len(ranks) > 1)} {_ranges(ranks)}{on_hosts}"
    return f"host{'s' * (len(hosts) > 1)} {format_names(hosts)}" if hosts else "a rank"


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
    return format_names([str(start) if start == end else f"{start}-{end}" for start, end in ranges])


def format_failure_page(failure: Failure, *, width: int = 100, colour: bool = False, record: str = "") -> str:
    """Show what happened, where, the likely cause and the remedy, in at most 25 lines.

    The page contains neither the `error: ` of an exit status nor a Python traceback: tools search logs for both.
    `record` is the path of `failure.json`, "" if it could not be written.
    """
    width = max(width, MIN_WIDTH)
    place = "" if failure.kind == "missing" else where_in_run(failure)
    headline = f"The run failed: {who_failed(failure)} {what_happened(failure)} {place}"
    lines = _wrap(_plain(headline), width, HEADLINE_LINES)
    if colour:
        lines = [f"\033[1;31m{line}\033[0m" for line in lines]
    lines += [f"  {line}" for line in _error_lines(failure, width - 2)]
    lines += _labelled("Where", _place(failure), width, 2)
    cause = likely_cause(failure)
    if cause is not None:
        lines += _labelled(cause.label, f"{cause.title}. {cause.explanation}", width, CAUSE_LINES)
        lines += _labelled("What to do", cause.remedy, width, REMEDY_LINES)
    lines += _secondary_lines(failure, width)
    if record:
        lines += _labelled("Record", record, width, 1)
    if failure.checkpoint:
        lines += _labelled("Resume from", f"{failure.checkpoint} (--resume_from_checkpoint auto)", width, 1)
    return "\n".join(lines)


def _error_lines(failure: Failure, width: int) -> list[str]:
    """Return the first lines of the message, or the last lines of the traceback if there is no message."""
    text = failure.error or "\n".join(failure.traceback.splitlines()[-2:])
    kept = [line for line in _plain(text).splitlines() if line.strip() and not FRAME.match(line)]
    wrapped = [part for line in kept for part in _wrap(line, width, ERROR_LINES + 1)]
    return wrapped if len(wrapped) <= ERROR_LINES else [*wrapped[: ERROR_LINES - 1], "..."]


def _place(failure: Failure) -> str:
    """Return `rank 3 on node1, in step 120, after 12 s (oom_kill 0 -> 1)`."""
    parts = [who_failed(failure), where_in_run(failure)]
    if failure.seconds is not None and failure.kind not in ("stuck", "missing"):
        parts.append(f"after {failure.seconds:,.0f} s")
    hints = f" ({'; '.join(failure.hints[:2])})" if failure.hints else ""
    return ", ".join(filter(None, parts)) + hints


def _secondary_lines(failure: Failure, width: int) -> list[str]:
    count = len(failure.also)
    if not count:
        return []
    first = f"; the first {ALSO_LINES}" if count > ALSO_LINES else ""
    shown = (_wrap(_plain(line), width - 2, 1) for line in failure.also[:ALSO_LINES])
    return [
        f"{count} more failed later, mostly because of this{first}:",
        *(f"  {line}" for lines in shown for line in lines),
    ]


def _labelled(label: str, text: str, width: int, max_lines: int) -> list[str]:
    """Return `label: text`, with further lines indented to the text."""
    indent = len(label) + 2
    text = " ".join(_plain(text).split())
    first, *others = _wrap(text, width - indent, max_lines)
    return [f"{label}: {first}", *(" " * indent + line for line in others)]


def _plain(text: str) -> str:
    """Remove colours, control characters, and the `error: ` that begins the message of an exit status."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).expandtabs(4)
    text = "".join(letter if letter == "\n" or letter.isprintable() else " " for letter in text)
    return re.sub(r"(?m)^\s*error(?: \([^)]*\))?: ", "", text).replace("error: ", "error - ")


def _wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Break text into lines with the indentation of the first; the last ends with `...` if something is left out."""
    if any(east_asian_width(letter) in "WF" for letter in text):
        width //= 2  # such letters take two columns
    indent = text[: len(text) - len(text.lstrip())][: width // 2]
    lines = textwrap.wrap(text[: (max_lines + 1) * width], width, subsequent_indent=indent, break_on_hyphens=False)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], f"{lines[max_lines - 1][: width - 4]} ..."]
