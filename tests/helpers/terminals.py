"""A program in a terminal of its own: typed to, and what it shows waited for."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Sequence
from typing import Any

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>()][0-9A-B]?)|\r")


class Terminal:
    """A program with a terminal of so many columns and lines; leaving the block ends it."""

    def __init__(self, command: Sequence[Any], *, columns: int = 100, lines: int = 30, **environment: str) -> None:
        self.command = [*map(str, command)]
        self.size = struct.pack("HHHH", lines, columns, 0, 0)
        self.environment = {**os.environ, "TERM": "xterm-256color", **environment}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            self.environment.pop(name, None)
        self.raw = ""
        self._at = 0
        self.status: int | None = None

    def __enter__(self) -> Terminal:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, self.size)
            os.execve(self.command[0], self.command, self.environment)
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self.handle)

    @property
    def shown(self) -> str:
        """All that was shown, without colours and the like."""
        return ESCAPES.sub("", self.raw)

    def type(self, text: str) -> None:
        """Keys, control characters too."""
        os.write(self.handle, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What is shown from where the last wait ended until `text` is there."""
        deadline = time.monotonic() + seconds
        while (found := self.shown.find(text, self._at)) < 0:
            assert self._read(deadline), f"{text!r} is not shown:\n{self.shown[self._at :]}"
        before, self._at = self._at, found + len(text)
        return self.shown[before : self._at]

    def wait_for_end(self, seconds: float = 30) -> int:
        """The exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        assert time.monotonic() < deadline, f"it has not ended:\n{self.shown[self._at :]}"
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def _read(self, deadline: float) -> bool:
        """Whether anything more came."""
        ready, _, _ = select.select([self.handle], [], [], max(0, deadline - time.monotonic()))
        try:
            more = os.read(self.handle, 65536) if ready else b""
        except OSError:  # the program has ended
            more = b""
        self.raw += more.decode("utf-8", "replace")
        return bool(more)
