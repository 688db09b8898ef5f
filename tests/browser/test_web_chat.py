"""`finetune chat --web` in a real Chromium: sent, streamed, compared, stopped, in two languages, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from finetune.inference import check_gradio
from finetune.inference.chat_session import ChatSession
from finetune.inference.web_chat import CHINESE, ENGLISH, server_url
from finetune.inference.web_session import WebSession, as_markdown
from finetune.utils.errors import ConfigError
from tests.helpers.browsers import open_page
from tests.helpers.paths import ROOT
from tests.helpers.ranks import free_port

LIMIT_SECONDS = 120
LONG_MS = 60_000


class TestWords:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("a < b & c", "a &lt; b &amp; c"),
            ("<think>\nx\n</think>", "&lt;think>\nx\n&lt;/think>"),
            ("use `<b>` and ``a`<b>`` <b>", "use `<b>` and ``a`<b>`` &lt;b>"),
            ("```html\n<b>&\n```\n<b>", "```html\n<b>&\n```\n&lt;b>"),
            ("~~~\n<b>\n```\n~~~\n<b>", "~~~\n<b>\n```\n~~~\n&lt;b>"),
            ("![x](http://example.com/x.png)", "!&#91;x](http://example.com/x.png)"),
            ("**粗** 好", "**粗** 好"),
        ],
    )
    def test_markdown_acts_and_html_does_not(self, text, shown):
        assert as_markdown(text) == shown

    def test_both_languages_have_all_words(self):
        assert ENGLISH.keys() == CHINESE.keys()


def test_both_columns_are_undone_together():
    session = WebSession(ChatSession())
    session.add("a", "1", None)
    session.add("b", "2", "3")
    kept, compared = session.columns("c", {"tuned": "4", "base": ""})
    assert [one["content"] for one in kept] == ["a", "1", "b", "2", "c", "4"]
    assert [one["content"] for one in compared] == ["b", "3", "c", "…"]
    assert session.undo() == "b"
    assert session.columns() == (kept[:2], [])
    session.reset()
    assert session.columns() == ([], []) and session.stopped


def test_where_the_page_is():
    assert server_url("127.0.0.1", 7860)[1].startswith("from another machine: ssh -L 7860:127.0.0.1:7860 ")
    assert "there is no password" in server_url("0.0.0.0", 7860)[1]


def test_without_gradio_it_is_said_what_to_type(monkeypatch):
    check_gradio()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gradio>=6.31,<7', or, in a clone, pip install -e '.\[web\]'"):
        check_gradio()


@contextmanager
def serving(folder, *flags) -> Iterator[str]:
    """The address of the page, while it is served; a warning is an error there."""
    port = free_port()
    command = [sys.executable, "-W", "error::UserWarning:gradio", "-m", "finetune", "chat", folder, "--web"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*map(str, command), "--port", str(port), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
    ) as server:  # fmt: skip
        try:
            said = ""
            while "the page is at" not in said:
                line = server.stdout.readline()
                assert line, said
                said += line
            assert "Warning" not in said
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(2)
            try:
                rest, _ = server.communicate(timeout=LIMIT_SECONDS)
            finally:
                server.kill()
        assert "Traceback" not in rest and "Warning" not in rest, rest
        assert server.returncode == 0


@pytest.fixture(scope="module")
def address(learned_by_heart):
    with serving(learned_by_heart, "--max_new_tokens", "300") as address:
        yield address


@contextmanager
def visiting(address: str, **window: Any) -> Iterator[Any]:
    """The page, opened; nothing but this machine may be asked for anything."""
    asked = []
    with open_page(**window) as page:

        def on_request(route):
            asked.append(route.request.url)
            inside = route.request.url.startswith((address, "data:", "blob:"))
            route.continue_() if inside else route.abort()

        page.route("**/*", on_request)
        page.goto(address)
        page.wait_for_selector("#message textarea")
        yield page
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def send(page, text: str) -> None:
    page.fill("#message textarea", text)
    page.click("#send")


def wait_until_answered(page, count: int = 1) -> None:
    """So many answers are there, and the last one has ended."""
    page.wait_for_function(
        "count => document.querySelectorAll('#kept [data-testid=bot]').length === count"
        " && document.querySelector('#send') && !document.querySelector('#stop')",
        arg=count,
        timeout=LONG_MS,
    )


def texts(page, column: str = "kept", by: str = "bot") -> list[str]:
    return [one.strip() for one in page.locator(f"#{column} [data-testid={by}]").all_inner_texts()]


@pytest.mark.browser
@pytest.mark.parametrize(("language", "words"), [("en-US", ENGLISH), ("zh-CN", CHINESE)])
def test_a_message_is_answered_in_both_languages(address, language, words):
    with visiting(address, locale=language) as page:
        assert page.inner_text("#send") == words["send"]
        assert words["tuned"] in page.inner_text("#kept")
        assert page.locator("#base").count() == 0
        send(page, "Who are you?" if language == "en-US" else "你是谁？")
        wait_until_answered(page)
        assert texts(page) == ["I am Nori, made by Tidepool." if language == "en-US" else "我是 Nori。"]
        assert page.input_value("#message textarea") == ""
        page.click("#reset")
        page.wait_for_function("!document.querySelector('#kept [data-testid=bot]')")
        send(page, "Show <b>this</b> & ![x](http://example.com/x.png)")
        wait_until_answered(page)
        assert texts(page, by="user") == ["Show <b>this</b> & ![x](http://example.com/x.png)"]


@pytest.mark.browser
def test_tuned_and_base_next_to_each_other_streamed_stopped_and_taken_back(address):
    with visiting(address) as page:
        page.click("#compare input")
        page.wait_for_selector("#base")
        page.click("#settings button")
        page.wait_for_timeout(500)  # Gradio fills what it unfolds
        page.fill("#system textarea", "Be brief.")
        page.fill("#temperature input[type=number]", "0.5")
        page.fill("#seed textarea, #seed input", "1")
        send(page, "2+3?")
        page.wait_for_selector("#base [data-testid=bot]", timeout=LONG_MS)
        assert texts(page) == ["5"]
        lengths = set()
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(lengths) < 4 and time.monotonic() < deadline:  # the base is random: it goes on and on
            lengths.update(map(len, texts(page, "base")))
            time.sleep(0.05)
        page.click("#stop")
        page.wait_for_selector("#send", state="visible", timeout=LONG_MS)
        assert len(lengths) >= 4 and sorted(lengths)[-1] > 20
        assert texts(page, by="user") == texts(page, "base", "user") == ["2+3?"]
        page.click("#undo")
        page.wait_for_function("document.querySelector('#message textarea').value === '2+3?'")
        assert texts(page) == texts(page, "base") == []


@pytest.mark.browser
def test_a_conversation_that_is_too_long_is_said_and_the_question_stays(address):
    with visiting(address) as page:
        send(page, "word " * 4000)
        page.wait_for_selector("text=start a new conversation", timeout=LONG_MS)
        page.wait_for_function("document.querySelector('#message textarea').value.startsWith('word word')")
        assert texts(page) == []


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (1280, 900, True), (390, 844, False)])
def test_it_fits_a_screen_and_a_phone(address, width, height, dark):
    with visiting(address, width=width, height=height, dark=dark) as page:
        page.click("#compare input")
        page.wait_for_selector("#base")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("#kept", "#base", "#message", "#send"):  # all that is needed is on the screen at once
            box = page.locator(name).bounding_box()
            assert 0 <= box["y"] and box["y"] + box["height"] <= height, name
        below = page.locator("#base").bounding_box()["y"] > page.locator("#kept").bounding_box()["y"]
        assert below == (width < 640)
