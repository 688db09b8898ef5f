"""A failure on one page of plain text, for a terminal or a log."""

from __future__ import annotations

import re
from unicodedata import east_asian_width

from finetune.diagnostics.causes import likely_cause
from finetune.diagnostics.failure_record import Failure
from finetune.diagnostics.failure_text import what_happened, where_in_the_run, who

ERROR_LINES, CAUSE_LINES, TO_DO_LINES, OTHERS = 6, 4, 5, 3
NARROWEST = 60


def page(failure: Failure, *, width: int = 100, colour: bool = False, record: str = "") -> str:
    """What happened, where, why probably, and what to do: at most 25 lines of `width` columns, at least 60.

    It never holds the text that opens the one message of an exit status, nor the looks of a Python traceback, both of
    which are searched for in logs.

    Args:
        failure: the first one of the run.
        colour: whether the headline is bold and red.
        record: where `failure.json` lies, "" where it could not be written.
    """
    width = max(width, NARROWEST)
    where = "" if failure.kind == "missing" else where_in_the_run(failure)
    head = "was stopped" if failure.kind == "stopped" else "failed"
    headline = _wrapped(_plain(f"The run {head}: {who(failure)} {what_happened(failure)} {where}"), width, 2)
    if colour:
        headline = [f"\033[1;31m{line}\033[0m" for line in headline]
    lines = [*headline, *(f"  {line}" for line in _error(failure, width - 2))]
    labelled = [("Where", _where(failure), 2)]
    cause = likely_cause(failure)
    if cause is not None:
        labelled += [
            ("Likely cause", f"{cause.title}. {cause.why}", CAUSE_LINES),
            ("What to do", cause.do, TO_DO_LINES),
        ]
    for label, text, most in labelled:
        lines += _labelled(label, text, width, most)
    lines += _others(failure, width)
    if record:
        lines += _labelled("Record", record, width, 1)
    if failure.checkpoint:
        lines += _labelled("Go on from", f"{failure.checkpoint} (--resume_from_checkpoint auto)", width, 1)
    return "\n".join(lines)


def _error(failure: Failure, width: int) -> list[str]:
    """The first lines of the message, or what a traceback ends with where there is none."""
    text = failure.error or "\n".join(failure.traceback.splitlines()[-2:])
    kept = [line for line in _plain(text).splitlines() if line.strip() and not _is_frame(line)]
    wrapped = [one for line in kept for one in _wrapped(line, width, ERROR_LINES + 1)]
    return wrapped if len(wrapped) <= ERROR_LINES else [*wrapped[: ERROR_LINES - 1], "..."]


def _is_frame(line: str) -> bool:
    return re.match(r"Traceback|\s*File \"|\s*[\^~]+\s*$|frame #\d|\s+raise |Exception raised from", line) is not None


def _where(failure: Failure) -> str:
    """`rank 3 on node1, in step 120, after 12 s there`, and what was seen beside it."""
    parts = [who(failure), where_in_the_run(failure)]
    if failure.seconds is not None and failure.kind not in ("stuck", "missing"):
        parts.append(f"after {failure.seconds:,.0f} s there")
    hints = f" ({'; '.join(failure.hints[:2])})" if failure.hints else ""
    return ", ".join(filter(None, parts)) + hints


def _others(failure: Failure, width: int) -> list[str]:
    count = len(failure.also)
    if not count:
        return []
    shown = [f"  {_clipped(_plain(one), width - 2)}" for one in failure.also[:OTHERS] if one]
    more = f"; the first {OTHERS}" if count > OTHERS else ""
    return [f"{count} more failed later, mostly because of this{more}:", *shown]


def _labelled(label: str, text: str, width: int, most: int) -> list[str]:
    """`Label: text`, continued below the text."""
    room = len(label) + 2
    text = " ".join(_plain(text).split())
    first, *others = _wrapped(text, width - room, most) if most > 1 else [_clipped(text, width - room)]
    return [f"{label}: {first}", *(" " * room + line for line in others)]


def _plain(text: str) -> str:
    """Text without colours and control characters, and without what opens the message of an exit status."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).expandtabs(4)
    text = "".join(one if one == "\n" or one.isprintable() else " " for one in text)
    return re.sub(r"(?m)^\s*error(?: \([^)]*\))?: ", "", text).replace("error: ", "error - ")


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """At most `most` lines, broken at spaces, and inside a word where it is longer than a line."""
    indent = text[: len(text) - len(text.lstrip())][: width // 2]
    lines, line = [], indent
    for word in text.split():
        if line.strip() and _columns(line) + 1 + _columns(word) > width:
            lines.append(line)
            line = indent
        line = f"{line} {word}" if line.strip() else line + word
        while _columns(line) > width:
            fits = _fitting(line, width)
            lines.append(line[:fits])
            line = indent + line[fits:]
        if len(lines) > most:
            break
    lines += [line] if line.strip() else []
    return lines if len(lines) <= most else [*lines[: most - 1], _clipped(lines[most - 1] + " ...", width)]


def _clipped(text: str, width: int) -> str:
    """One line, with `...` where something is left out."""
    return text if _columns(text) <= width else text[: _fitting(text, width - 4)].rstrip() + " ..."


def _columns(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return len(text) if text.isascii() else sum(1 + (east_asian_width(one) in "WF") for one in text)


def _fitting(text: str, width: int) -> int:
    """How many characters fit, at least one."""
    taken = 0
    for number, one in enumerate(text):
        taken += _columns(one)
        if taken > width:
            return max(number, 1)
    return len(text)
