"""The errors of this package, one class for each exit status.

    FinetuneError            1  any other error with an explanation
    ├── ConfigError          2  a flag, a config file, the hardware asked for
    ├── DataError            3  conversation files and what they render to
    ├── CheckpointError      4  a checkpoint or saved result that is damaged or does not match
    ├── NumericsError        5  numbers that are not finite
    └── StorageError         6  no space, no permission, a file that cannot be written

A new error inherits from the class whose exit status it shares. Any other exception is a bug and keeps its traceback.
"""

import atexit
import errno
import os
import re
import select
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TextIO

SHOWN_FAULTS, SHOWN_NAMES = 20, 8
DISK_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
EXIT_UNFLUSHED = 120  # as Python itself, when the last output cannot be written
INTERRUPTED, UNREAD = 130, 141  # as a shell says it of Ctrl-C, and of SIGPIPE
SECONDS_FOR_RANK_0, SECONDS_FOR_A_LINE = 8.0, 2.0


class FinetuneError(Exception):
    """A problem whose message names the value, the place and the remedy.

    Attributes:
        is_shared: all ranks have raised it, so rank 0 alone prints it.
        faults: the message in parts, each of which says one thing; empty where the message shows not all of them.
    """

    status = 1
    is_shared = False
    faults: tuple[str, ...] = ()


class ConfigError(FinetuneError):
    """Flags, configuration files or hardware: the run cannot start as asked."""

    status = 2


class DataError(FinetuneError):
    """Conversations that cannot be read or rendered."""

    status = 3


class CheckpointError(FinetuneError):
    """A checkpoint or result that is damaged, incomplete, or of another model."""

    status = 4


class NumericsError(FinetuneError):
    """Loss, gradients or weights that are no longer finite."""

    status = 5


class StorageError(FinetuneError):
    """A file that cannot be written: no space, no permission."""

    status = 6


def format_faults(faults: Sequence[str], noun: str) -> str:
    """Join faults to one message: the first 20 in full, then how many more there are.

    >>> print(format_faults(["a.json, row 0: no turns", "a.json, row 4: no turns"], "faulty row"))
    2 faulty rows:
      a.json, row 0: no turns
      a.json, row 4: no turns
    """
    count = len(faults)
    if count == 1:
        return faults[0]
    lines = [f"{count:,} {noun}s:", *(f"  {fault}" for fault in faults[:SHOWN_FAULTS])]
    if count > SHOWN_FAULTS:
        lines.append(f"  ... and {count - SHOWN_FAULTS:,} more")
    return "\n".join(lines)


def raise_faults(faults: Iterable[str], error: type[FinetuneError] = ConfigError, noun: str = "fault") -> None:
    """Raise one error with all faults, each once, if there are any."""
    found = tuple(dict.fromkeys(faults))
    if found:
        raised = error(format_faults(found, noun))
        raised.faults = found if len(found) <= SHOWN_FAULTS else ()
        raise raised


def format_names(names: Sequence[str]) -> str:
    """Join names: the first 8, then how many more there are.

    >>> format_names(["a.weight", "b.weight"])
    'a.weight, b.weight'
    """
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def shorten(text: str, most: int = 60) -> str:
    """Return a text, or its beginning and `...`, in at most so many characters.

    >>> shorten("conversations", 10)
    'convers...'
    """
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", *, most: int = 1, cutoff: float = 0.6) -> str:
    """Return `did you mean X or Y?` with those of the known words that are most alike, else what to say `otherwise`."""
    close = get_close_matches(word, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def lines_of(text: str, otherwise: str = "it printed nothing") -> list[str]:
    """Return the lines of a program's output that are not blank, or one line that says so.

    >>> lines_of("\\n  no such layer\\nsee the manual\\n")
    ['no such layer', 'see the manual']
    """
    return [line.strip() for line in text.splitlines() if line.strip()] or [otherwise]


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the type of an error without one."""
    return lines_of(str(error), type(error).__name__)[0]


def as_os_error(error: Exception) -> OSError | None:
    """Return the error of the system behind that of a library.

    Those of Rust (safetensors, tokenizers) end in its number, torch has the text of an error of the disk.

    >>> as_os_error(ValueError("no space"))
    >>> as_os_error(Exception("Error while serializing: I/O error: No space left on device (os error 28)")).errno
    28
    """
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    codes = (int(number[1]),) if number else (code for code in DISK_CODES if os.strerror(code) in str(error))
    return next((OSError(code, os.strerror(code)) for code in codes), None)


def os_reason(error: OSError, path: Path) -> str:
    """Say why `path` could not be written: a file in the way, a folder that is gone, no inodes, or the error itself."""
    if isinstance(error, NotADirectoryError | FileExistsError):
        in_the_way = next((parent for parent in (path, *path.absolute().parents) if parent.is_file()), None)
        if in_the_way is not None:
            return f"{in_the_way} is a file, not a folder"
    gone = [parent for parent in path.absolute().parents if not parent.exists()]
    if isinstance(error, FileNotFoundError) and gone:
        return f"the folder {gone[-1]} is gone: it was moved, renamed or deleted"
    if error.errno == errno.ENOSPC:
        folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        if os.statvfs(folder).f_files and not os.statvfs(folder).f_favail:
            return f"no inode is left on the file system of {folder} (`df -i`): remove files there that are not needed"
    return error.strerror or str(error)


@contextmanager
def storage_errors(path: Path, shown: str | None = None) -> Iterator[None]:
    """Turn an error of the system inside the block into a `StorageError` with `path`, or what is `shown` for it."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{shown or path}: {os_reason(error, path)}") from error


def missing_reason(path: Path) -> str:
    """Say why no file can be read at `path`: nothing or no file is there, or another user owns a folder above."""
    try:
        path.stat()
    except PermissionError:
        return denied(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # a loop of links
            return error.strerror or str(error)
        if os.path.islink(path):
            return f"is a link to {os.readlink(path)}, which does not exist"
        return f"there is no such file{near_paths(path)}"
    return "is a folder, not a file" if path.is_dir() else "is not a regular file"


def near_paths(path: Path) -> str:
    """Return `: did you mean X?` with what a folder holds of a name like that of a missing path; or nothing."""
    if "$" in str(path):
        return ": a variable is replaced by the shell alone, not in a recipe or in '': write the path itself"
    try:
        names = sorted(os.listdir(path.absolute().parent))
    except OSError:
        return ""
    near = get_close_matches(path.name, names, n=3, cutoff=0.7)
    return f": did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else ""


def denied(path: str | Path) -> str:
    """Say of a path that another user owns it, and where that is shown."""
    return f"permission denied: `namei -l {path}` shows whose it is"


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a `FinetuneError` into one `error: ...` on stderr and its exit status, and Ctrl-C into status 130.

    Ends quietly with status 141 where nobody reads stdout any more, as in `finetune recipes | head -3`.

    Names the path of a file or folder that another user owns, with status 2: asking whether one exists may already
    raise a `PermissionError`; and a package that is not installed.

    Rank 0 prints at once. Other ranks wait a few seconds: after the same error on rank 0 the launcher ends the ranks of
    that host before they print. A rank that is still alive then has an error of its own, or is on another host. Rank 0
    alone prints an error with `is_shared`.
    """
    try:
        with _paths_and_packages():
            yield
    except FinetuneError as error:
        rank = int(value) if (value := os.environ.get("RANK", "")).isdecimal() else 0
        if rank != 0:
            time.sleep(SECONDS_FOR_A_LINE if error.is_shared else SECONDS_FOR_RANK_0)
        if rank != 0 and error.is_shared:
            sys.exit(error.status)
        origin = "" if rank == 0 else f" (rank {rank})"
        print(f"error{origin}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        sys.exit(UNREAD)


def _is_unread(stream: TextIO) -> bool:
    """Whether the reader of a pipe is gone; what is still to be written is dropped then."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True


@contextmanager
def _paths_and_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or find_spec(package) is not None:
            raise
        raise ConfigError(
            f"the package {package} is not installed for {sys.executable}: run `make install` in the clone, then use "
            "its .venv/bin; or install the wheel again"
        ) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename is None:
            raise ConfigError(
                "the working directory is gone, it was moved or deleted: change to another one"
            ) from error
        if error.filename is None and error.errno in DISK_CODES:
            raise StorageError(f"the output cannot be written: {error.strerror}: free some space there") from error
        if error.filename is None or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        reason = denied(error.filename) if isinstance(error, PermissionError) else f"{error.strerror}: shorten it"
        raise ConfigError(f"{error.filename}: {reason}") from error


@contextmanager
def process_exit_guard() -> Iterator[None]:
    """End the process with the status of the block, without running C++ destructors.

    Threads of a communication library may still run, above all where a rank leaves the others in the middle of a run. A
    thread that runs while it is destroyed aborts the process with status 134. Python's own exit handlers run before.
    """
    statuses: list[int] = []
    atexit.register(_exit_at_the_end, statuses)  # runs after the handlers of libraries that are imported later
    try:
        yield
    except SystemExit as error:
        statuses.append(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise
    except FinetuneError as error:  # `exit_on_error` may stand around this block as well as in it
        statuses.append(error.status)
        raise
    except BaseException:
        statuses.append(1)
        raise
    else:
        statuses.append(0)


def _exit_at_the_end(statuses: list[int]) -> None:
    if statuses:
        exit_now(statuses[0])


def exit_now(status: int) -> NoReturn:
    """End the process without waiting for its threads; standard streams are flushed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            status = status or UNREAD
        except (OSError, ValueError, AttributeError):  # None is a stream that was closed before the start
            status = status or EXIT_UNFLUSHED
    os._exit(status)
