"""Detect UTF-8 text that some program decoded as Latin-1 or Windows-1252: 你好 became ä½\xa0å¥½.

It is valid text, so it is not a fault; but a model would learn it, so the user gets a note.
"""

from __future__ import annotations

# Rarer than this, such texts may be about the phenomenon itself.
MIN_REPORTED_SHARE = 0.01
SHOWN_CHARACTERS = 12


def intended_text(text: str) -> str | None:
    """The text before it was decoded with the wrong encoding; None if it never was.

    >>> intended_text("caf" + "é".encode().decode("latin-1"))
    'café'
    """
    if text.isascii():
        return None
    import ftfy.bad_codecs  # noqa: F401  registers Windows-1252 with its five undefined bytes

    for encoding in ("latin-1", "sloppy-windows-1252"):
        try:
            return text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
    return None


class MojibakeCounter:
    """Counts the rows of one source that hold mojibake; remembers the first."""

    def __init__(self) -> None:
        self.rows = self.non_ascii_rows = 0
        self._first = ""

    def add(self, texts: list[str], row: int) -> None:
        """Count a row with these texts."""
        non_ascii = [text for text in texts if not text.isascii()]
        self.non_ascii_rows += bool(non_ascii)
        pair = next(((text, intended) for text in non_ascii if (intended := intended_text(text)) is not None), None)
        if pair is None:
            return
        self.rows += 1
        if not self._first:
            start = next(index for index, letter in enumerate(pair[0]) if not letter.isascii())
            text, intended = (side[start : start + SHOWN_CHARACTERS] for side in pair)
            self._first = f"row {row}: {text!r} was {intended!r}"

    def merge(self, other: MojibakeCounter) -> None:
        """Add the counts of later rows."""
        self.rows += other.rows
        self.non_ascii_rows += other.non_ascii_rows
        self._first = self._first or other._first

    def note(self, name: str) -> str | None:
        """A line for the user if more than a few rows are affected."""
        if not self.rows or self.rows < MIN_REPORTED_SHARE * self.non_ascii_rows:
            return None
        return (
            f"{name}: {self.rows:,} of {self.non_ascii_rows:,} rows beyond ASCII look like UTF-8 that was read as "
            f"Latin-1 or Windows-1252 and written again ({self._first}): the model would learn it so: write the file "
            "again from its original"
        )
