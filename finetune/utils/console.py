"""Output of the command line: what this package logs, and how much other libraries log.

Modules log with `logging.getLogger(__name__)`: progress as INFO, notes for the user as WARNING. `configure_logging`
prints both on rank 0.
"""

from __future__ import annotations

import codecs
import io
import locale
import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Before peft imports it wherever it is installed: of a kernel of the hub, and of the type of each product in 8 bits.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
LABEL_WIDTH = 12
SIMILAR = {
    "«": "<<", "»": ">>", "⟦": "[[", "⟧": "]]", "‹": "<", "›": ">", "→": "->", "…": "...", "±": "+-", "·": ".",
    "×": "x", "‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "•": "*", "\u00a0": " ", "\ufffd": "?",
}  # fmt: skip
# Warnings that users cannot act on; torch and DeepSpeed print them once per rank.
KNOWN_WARNINGS = (
    r".*all_gather_into_tensor.*",
    r".*reduce_scatter_tensor.*",
    r".*_all_gather_base.*",
    r".*_reduce_scatter_base.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*barrier\(\): using the device under current context.*",
    r".*`is_gradient_checkpointing` is deprecated.*",
    r".*Position ids are not supported for parameter efficient tuning.*",
    r".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*",
)


def log_notes(notes: Iterable[str]) -> None:
    """Show what the user should know: decisions that differ from the flags, and the like."""
    for note in notes:
        logging.getLogger(__name__).warning(note)


def is_rank_0() -> bool:
    """Whether this process prints for the run."""
    return os.environ.get("RANK", "0") == "0"


class _ConsoleHandler(logging.Handler):
    """Print records of the package: progress (INFO) as it is, notes (WARNING) with a prefix; rank 0 only.

    A record with the attribute `all_ranks` is printed by every rank that logs it.
    """

    def __init__(self, *, to_stderr: bool, prefix: str | None) -> None:
        super().__init__()
        self.to_stderr, self.prefix = to_stderr, prefix
        self.file: Path | None = None
        self.early: list[str] = []  # lines from before there was a file

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; the stream is looked up each time, because it may have been replaced."""
        if is_rank_0() or getattr(record, "all_ranks", False):
            default = "note: " if record.levelno >= logging.WARNING else ""
            line = (default if self.prefix is None else self.prefix) + record.getMessage()
            stream = sys.stderr if self.to_stderr else sys.stdout
            if not getattr(record, "file_only", False):
                write_line(line, stream)
            self.early.append(line)
            self.write_file()

    def write_file(self) -> None:
        """Append the lines to the log file, if there is one; a disk that is full ends no run."""
        if self.file is None:
            return
        lines, self.early = self.early, []
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            write_line(f"note: {self.file} is not written any more: {error.strerror}", sys.stderr)
            self.file = None


def log_to_file(path: Path) -> None:
    """Write what the package has logged so far, and logs from now on, to a file, too; rank 0 calls this."""
    for handler in logging.getLogger("finetune").handlers:
        if isinstance(handler, _ConsoleHandler):
            handler.file = path
            handler.write_file()


def wrapped(text: str) -> str:
    """Wrap the lines of a text to at most 80 columns; what follows a label or a prefix hangs under its beginning."""
    columns = min(width(), 80)
    lines = []
    for line in text.split("\n"):
        label = re.match(r" *(?:[a-z]+: |\d+\. |\S{1,24}(?: \S{1,12})? {2,})?", line)
        indent = " " * (label.end() if label and label.end() < columns // 2 else 2)
        is_text = len(line) > columns and line.isprintable()
        # Paths and flags stay whole.
        wrapper = textwrap.TextWrapper(
            columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        lines += wrapper.wrap(line) if is_text else [line]
    return "\n".join(lines)


def print_wrapped(text: str, stream: TextIO) -> None:
    """Print a text, wrapped where it goes to a terminal."""
    print(wrapped(text) if stream.isatty() else text, file=stream, flush=True)


def rich_console(**options: Any) -> Console:
    """Return a console of rich; where the reader of a pipe is gone, it raises `BrokenPipeError` as `print` does."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PlainConsole(**options)


def write_line(line: str, stream: TextIO) -> None:
    """Print a line; once the reader of a pipe is gone, its lines are dropped, and the run continues."""
    try:
        print_wrapped(line, stream)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for all that write there, libraries too
        if stream is not sys.stderr:
            write_line("note: nobody reads stdout any more (broken pipe): its lines are dropped", sys.stderr)


def open_standard_streams() -> None:
    """Open /dev/null for stdin, stdout and stderr where they are closed: other files would get their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))


def use_utf8() -> None:
    """Start this process again in UTF-8 mode if files would be read in another encoding; the streams keep theirs.

    Libraries read files of their own in the encoding of the locale, and fail in one like ASCII or GBK.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def configure_logging(*, to_stderr: bool = False, prefix: str | None = None) -> None:
    """Print what the package logs; each entry point of the command line calls this once.

    With `to_stderr` stdout stays free for a result. `prefix` stands in front of every line, instead of `note: `.
    """
    logger = logging.getLogger("finetune")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _ConsoleHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_ConsoleHandler(to_stderr=to_stderr, prefix=prefix))
    logger.setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Set the log levels of libraries: warnings on rank 0, errors on the others; hide warnings without a remedy."""
    for pattern in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    if not is_rank_0():
        warnings.simplefilter("ignore")
    level = logging.WARNING if is_rank_0() else logging.ERROR
    os.environ["TRANSFORMERS_VERBOSITY"] = "warning" if is_rank_0() else "error"
    os.environ.setdefault("DS_LOG_LEVEL", "warning" if is_rank_0() else "error")
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns, once per rank, that it found no GPU
    transformers.utils.logging.set_verbosity(level)
    if not is_rank_0() or not is_terminal():
        transformers.utils.logging.disable_progress_bar()
    for name in ("accelerate", "peft", "torch.distributed", "torch.nn.parallel.distributed"):
        logging.getLogger(name).setLevel(level)
    # DeepSpeed sets its own level when it is imported, later: a filter stays
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= level)


def quiet_serving() -> None:
    """Silence transformers below errors, progress bars included, for commands that only generate."""
    for pattern in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def accept_all_characters(*, utf8: bool = False) -> None:
    """Let stdout and stderr take any text: what their encoding lacks is written in ASCII.

    Drawings and typographic signs become similar ASCII characters, others escapes such as `\\u4f60`. With `utf8` stdout
    is UTF-8 whatever the environment says, for output that programs read.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = "utf-8" if utf8 and stream is sys.stdout else None
            stream.reconfigure(encoding=encoding, errors="similar_ascii")


def _similar_ascii(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii_of, error.object[error.start : error.end])), error.end


def _ascii_of(character: str) -> str:
    code = ord(character)
    if 0x2800 <= code < 0x2900:  # Braille, of which the first has no dot
        return "*" if code > 0x2800 else " "
    if 0x2500 <= code < 0x2580:  # box drawing
        return {"\u2500": "-", "\u2501": "-", "\u2502": "|", "\u2503": "|"}.get(character, "+")
    if 0x2580 <= code < 0x25A0:  # blocks, of which the first eight rise
        return ".:-=+*##"[code - 0x2581] if 0x2581 <= code < 0x2589 else "#"
    return SIMILAR.get(character) or character.encode("ascii", "backslashreplace").decode()


codecs.register_error("similar_ascii", _similar_ascii)


def labelled(facts: Mapping[str, str]) -> list[str]:
    """Return one line per fact, behind its label."""
    return [f"{label:<{LABEL_WIDTH}}{text}" for label, text in facts.items()]


def size(number: float) -> str:
    """Return bytes in readable units: 1.5 GiB, 12 MiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**29 else f"{number / 2**20:,.0f} MiB"


def section(title: str, lines: Iterable[str]) -> str:
    """Return indented lines under a title, with a blank line in front."""
    return "\n".join(["", title, *(f"  {line}" for line in lines)])


def width() -> int:
    """Return the columns for a plot: those of the terminal, from 40 to 100."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, 100))


def is_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar can be redrawn in place."""
    return sys.stderr.isatty()
