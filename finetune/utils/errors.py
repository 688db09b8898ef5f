"""What can go wrong, as one tree; each branch is an exit status of its own.

    FinetuneError            1  anything else that we can explain
    ├── ConfigError          2  a flag, a config file, the hardware asked for
    ├── DataError            3  conversation files and what they render to
    ├── CheckpointError      4  a saved result that does not hold what it should
    ├── NumericsError        5  numbers that are not finite
    └── StorageError         6  no space, no permission, a file that cannot be written

A new error inherits from the branch whose exit status it shares. Anything that is not a `FinetuneError` is a bug
and keeps its traceback.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SHOWN_FAULTS = 20
SECONDS_FOR_RANK_0, SECONDS_FOR_A_LINE = 8.0, 2.0


class FinetuneError(Exception):
    """A problem whose message names the value, the place and the remedy.

    Attributes:
        is_shared: whether all ranks have raised it, so that rank 0 says it for all.
    """

    status = 1
    is_shared = False


class ConfigError(FinetuneError):
    """Usage or configuration: the run cannot start as asked."""

    status = 2


class DataError(FinetuneError):
    """The conversations cannot be read, or not be rendered as they stand."""

    status = 3


class CheckpointError(FinetuneError):
    """What was written does not hold what it should."""

    status = 4


class NumericsError(FinetuneError):
    """The numbers are no longer finite: what follows would learn nothing."""

    status = 5


class StorageError(FinetuneError):
    """The disk refused."""

    status = 6


def format_faults(faults: Sequence[str], noun: str, *, count: int | None = None) -> str:
    """All faults as one message: the first 20 in full, then the count (`count` where only the first were kept).

    >>> print(format_faults(["a.json, row 0: no turns", "a.json, row 4: no turns"], "faulty row"))
    2 faulty rows:
      a.json, row 0: no turns
      a.json, row 4: no turns
    """
    count = len(faults) if count is None else count
    if count == 1:
        return faults[0]
    lines = [f"{count:,} {noun}s:", *(f"  {fault}" for fault in faults[:SHOWN_FAULTS])]
    if count > SHOWN_FAULTS:
        lines.append(f"  ... and {count - SHOWN_FAULTS:,} more")
    return "\n".join(lines)


def first_line(error: BaseException) -> str:
    """What an error of a library says first; its type where it says nothing.

    >>> first_line(ValueError("\\n  no such layer\\nsee the manual"))
    'no such layer'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a `FinetuneError` into one `error: ...` on stderr and its exit status.

    Rank 0 prints at once. The other ranks wait a few seconds: when rank 0 saw the same fault its launcher ends those
    on its host before they speak; one that is still there has a fault of its own, or sits on another host, and prints.
    What all have agreed on (`is_shared`) is said by rank 0 alone.
    """
    try:
        yield
    except FinetuneError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank != 0:
            time.sleep(SECONDS_FOR_A_LINE if error.is_shared else SECONDS_FOR_RANK_0)
        if rank != 0 and error.is_shared:
            sys.exit(error.status)
        place = "" if rank == 0 else f" (rank {rank})"
        print(f"error{place}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)


UNFLUSHED = 120  # what Python itself ends with where the last words cannot be written


@contextmanager
def process_exit_guard() -> Iterator[None]:
    """For a process that only does what is in the block: it ends with its status, without the destructors of C++.

    Threads of a communication library may still run, most of all where a rank leaves the others in the middle of a run,
    and one that runs when it is destroyed aborts the process: its status would be 134. Python's own exit handlers run
    before.
    """
    ended: list[int] = []
    atexit.register(_leave, ended)  # called after what libraries that are imported later have registered
    try:
        yield
    except SystemExit as leaving:
        ended.append(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
        raise
    except FinetuneError as error:  # `exit_on_error` may stand around this block as well as in it
        ended.append(error.status)
        raise
    except BaseException:
        ended.append(1)
        raise
    else:
        ended.append(0)


def _leave(ended: list[int]) -> None:
    if ended:
        status = ended[0]
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                status = status or UNFLUSHED
        os._exit(status)
