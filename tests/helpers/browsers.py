"""A real Chromium, driven by playwright: what a page shows, and what happens when it is used."""

import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser_path() -> str:
    """The browser of this machine."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "no browser: apt-get install chromium fonts-noto-cjk"
    return found


@contextmanager
def open_page(
    *, width: int = 1280, height: int = 900, dark: bool = False, offline: bool = False, locale: str = "en-US"
) -> Iterator[Any]:
    """A page of playwright's, in a window of so many pixels; what its scripts complain about fails the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox", "--disable-gpu"])
        try:
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                offline=offline,
                locale=locale,
            )
            page = context.new_page()
            complaints: list[str] = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            yield page
            assert complaints == []
        finally:
            browser.close()


LEARNED_LIGHT, LEARNED_DARK = (0xD5, 0xF2, 0xDE), (0x12, 0x3A, 0x25)


PAPER_LIGHT, PAPER_DARK = (0xF5, 0xF6, 0xF8), (0x0F, 0x12, 0x16)


def run_browser(profile: Path, *flags: str) -> str:
    command = [browser_path(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--force-device-scale-factor=1", f"--user-data-dir={profile}", "--allow-file-access-from-files"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pixels(path: Path) -> list[bytes]:
    """The rows of an 8-bit RGB or RGBA PNG, three bytes a pixel."""
    data, at, packed = path.read_bytes(), 8, b""
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    step = {2: 3, 6: 4}[colour]
    assert depth == 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    raw, before, rows = zlib.decompress(packed), bytes(width * step), []
    for number in range(height):
        begin = number * (width * step + 1)
        before = _unfiltered(raw[begin], bytearray(raw[begin + 1 : begin + 1 + width * step]), before, step)
        rows.append(before)
    return [row if step == 3 else bytes(b for at, b in enumerate(row) if at % 4 < 3) for row in rows]


def _unfiltered(kind: int, row: bytearray, above: bytes, step: int) -> bytes:
    for at in range(len(row)):
        left, up = (row[at - step] if at >= step else 0), above[at]
        if kind == 1:
            row[at] = (row[at] + left) & 255
        elif kind == 2:
            row[at] = (row[at] + up) & 255
        elif kind == 3:
            row[at] = (row[at] + (left + up) // 2) & 255
        elif kind == 4:
            corner = above[at - step] if at >= step else 0
            nearest = min((left, up, corner), key=lambda one: abs(left + up - corner - one))
            row[at] = (row[at] + nearest) & 255
    return bytes(row)


def count(rows: list[bytes], colour: tuple[int, int, int]) -> int:
    wanted = bytes(colour)
    return sum(row[at : at + 3] == wanted for row in rows for at in range(0, len(row), 3))
