"""A real Chromium, driven by playwright: what a page shows, and what happens when it is used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
