"""How answers appear in a terminal: one after the other, or side by side."""

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

SIDE_BY_SIDE_FROM = 72  # columns
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LINES_AROUND = 5  # of a table, beside its cells


def printable(text: str) -> str:
    """The text without what would steer the terminal; a model may say anything."""
    return CONTROLS.sub("\ufffd", text)


def show_answer(console: Console, name: str, pieces: Iterable[str]) -> None:
    """Print a name, and behind it an answer as it comes."""
    console.print(Text(f"{name}: ", style="bold green"), end="", soft_wrap=True)
    try:
        for piece in pieces:
            console.print(Text(printable(piece)), end="", soft_wrap=True)
    finally:
        console.print()


@contextmanager
def nothing_echoed() -> Iterator[None]:
    """Inside the block keys do not appear among what is being shown; they are read afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(handle, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


class SideBySide:
    """Answers in columns; where a terminal is too narrow, or is none, below each other."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.texts = dict.fromkeys(names, "")
        self.in_columns = console.is_terminal and console.width >= SIDE_BY_SIDE_FROM
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
        """An answer as it comes."""
        if not self.in_columns:
            show_answer(self.console, name, pieces)
            return
        for piece in pieces:
            self.texts[name] += printable(piece)
            self._live.update(self._table(cropped=True))

    def _table(self, *, cropped: bool) -> Table:
        """What has been said so far; cropped to the last lines that fit, for a drawing that is replaced."""
        table = Table(expand=True, show_edge=False, pad_edge=False, header_style="bold green")
        for name in self.texts:
            table.add_column(name, ratio=1, overflow="fold")
        width = max(1, (self.console.width - 3 * (len(self.texts) - 1)) // len(self.texts))
        cells = [Text(text) for text in self.texts.values()]
        if cropped:
            room = max(1, self.console.height - LINES_AROUND)
            cells = [Text("\n").join(list(cell.wrap(self.console, width))[-room:]) for cell in cells]
        table.add_row(*cells)
        return table
