"""Show answers in a terminal: one after the other, or in columns side by side."""

from __future__ import annotations

import re
import sys
import termios
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.inference.answer_turns import ReasoningText

MIN_COLUMNS_FOR_TABLE = 72
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TABLE_FRAME_LINES = 5


def printable(text: str) -> str:
    """Replace control characters: generated text must not control the terminal."""
    return CONTROL_CHARACTERS.sub("\ufffd", text)


def styled(piece: str) -> Text:
    """A piece of an answer, dim if it is reasoning."""
    return Text(printable(piece), style="dim" if isinstance(piece, ReasoningText) else "")


def show_answer(console: Console, name: str, pieces: Iterable[str]) -> None:
    """Print a name and, after it, an answer while it is generated."""
    console.print(Text(f"{name}: ", style="bold green"), end="", soft_wrap=True)
    try:
        for piece in pieces:
            console.print(styled(piece), end="", soft_wrap=True)
    finally:
        console.print()


@contextmanager
def no_echo() -> Iterator[None]:
    """Do not echo keys inside the block; they are read afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    handle = sys.stdin.fileno()
    attributes = termios.tcgetattr(handle)
    silent = [*attributes[:3], attributes[3] & ~termios.ECHO, *attributes[4:]]
    termios.tcsetattr(handle, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, attributes)


class SideBySide:
    """Answers in columns; one below the other where the output is narrow or no terminal."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.texts = {name: Text() for name in names}
        self.in_columns = console.is_terminal and console.width >= MIN_COLUMNS_FOR_TABLE
        self._live = Live(console=console, refresh_per_second=12, transient=True)

    def __enter__(self) -> SideBySide:
        if self.in_columns:
            self._live.start()
            self._live.update(self._table(cropped=True))
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_columns:
            self._live.stop()
            self.console.print(self._table(cropped=False))

    def show(self, name: str, pieces: Iterable[str]) -> None:
        """Show an answer while it is generated."""
        if not self.in_columns:
            show_answer(self.console, name, pieces)
            return
        for piece in pieces:
            self.texts[name].append_text(styled(piece))
            self._live.update(self._table(cropped=True))

    def _table(self, *, cropped: bool) -> Table:
        """Draw all answers; `cropped` to the last lines that fit the screen, for a live display."""
        table = Table(expand=True, show_edge=False, pad_edge=False, header_style="bold green")
        for name in self.texts:
            table.add_column(name, ratio=1, overflow="fold")
        width = max(1, (self.console.width - 3 * (len(self.texts) - 1)) // len(self.texts))
        cells = [text.copy() for text in self.texts.values()]
        if cropped:
            height = max(1, self.console.height - TABLE_FRAME_LINES)
            cells = [Text("\n").join(list(cell.wrap(self.console, width))[-height:]) for cell in cells]
        table.add_row(*cells)
        return table
