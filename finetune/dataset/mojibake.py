"""Text that some program took for Latin-1 or Windows-1252 although it was UTF-8: 你好 became ä½\xa0å¥½.

It is valid JSON and valid text, so it is no fault; but a model would learn it, so it is said.
"""

from __future__ import annotations

import codecs

# The characters of Windows-1252 that are not those of Latin-1; five of its bytes have none and stay as they are.
_BYTES = {
    bytes([number]).decode("cp1252"): bytes([number])
    for number in range(0x80, 0xA0)
    if number not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
# Fewer of the rows with such a text than this may be about the thing itself.
SHARE_THAT_IS_SAID = 0.01
SHOWN_CHARACTERS = 12


def _windows_1252(error: UnicodeError) -> tuple[bytes, int]:
    """What `encode` is to write for characters outside Latin-1; at the first other one it gives up."""
    try:
        return b"".join(_BYTES[letter] for letter in error.object[error.start : error.end]), error.end
    except KeyError:
        raise error from None


codecs.register_error("finetune.windows_1252", _windows_1252)


def intended_text(text: str) -> str | None:
    """What the text was before it was read in the wrong encoding; None where it never was.

    >>> meant("caf" + "é".encode().decode("latin-1"))
    'café'
    """
    if text.isascii():
        return None
    try:
        try:
            written = text.encode("latin-1")
        except UnicodeEncodeError as error:
            begin = error.start
            # Nearly every text ends here: a Chinese letter, or a quotation mark behind ASCII, where no UTF-8 goes on.
            if not begin or text[begin] not in _BYTES or text[begin - 1].isascii():
                return None
            written = text.encode("latin-1", "finetune.windows_1252")
        return written.decode("utf-8")
    except UnicodeError:
        return None


class Mojibake:
    """Counts the rows of one source of which a text is mojibake; remembers the first."""

    def __init__(self) -> None:
        self.rows = self.rows_beyond_ascii = 0
        self._first = ""

    def see(self, texts: list[str], row: int) -> None:
        """Look at the texts of a row."""
        beyond = [text for text in texts if not text.isascii()]
        if not beyond:
            return
        self.rows_beyond_ascii += 1
        found = next(((text, was) for text in beyond if (was := intended_text(text)) is not None), None)
        if found is None:
            return
        self.rows += 1
        if not self._first:
            begin = next(place for place, letter in enumerate(found[0]) if not letter.isascii())
            text, was = (one[begin : begin + SHOWN_CHARACTERS] for one in found)
            self._first = f"row {row}: {text!r} was {was!r}"

    def line(self, name: str) -> str | None:
        """A line for the user where it is more than a few rows of a large file."""
        if not self.rows or self.rows < SHARE_THAT_IS_SAID * self.rows_beyond_ascii:
            return None
        return (
            f"{name}: {self.rows:,} of {self.rows_beyond_ascii:,} rows beyond ASCII look like UTF-8 that was read as "
            f"Latin-1 or Windows-1252 and written again ({self._first}): the model would learn it so: make the file "
            "anew from what it was before"
        )
