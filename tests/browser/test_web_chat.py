"""`finetune chat --web` in a real Chromium: sent, streamed, compared, stopped, in two languages, without a network."""

import contextlib
import html
import http.client
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.conversation import Turn
from finetune.inference import check_gradio
from finetune.inference.chat_session import ChatSession
from finetune.inference.web_chat import CHINESE, ENGLISH, MAX_CHARACTERS, _check_lengths, _sampling_params, server_url
from finetune.inference.web_session import WebSession, as_html
from finetune.utils.errors import ConfigError
from tests.helpers.browsers import open_page
from tests.helpers.paths import ROOT
from tests.helpers.ranks import free_port

LIMIT_SECONDS, SECONDS_TO_END = 120, 60
LONG_MS = 60_000


class TestWords:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("a < b & c", "<p>a < b & c</p>"),
            ("<think>\nx\n</think>", "<p><think><br>x<br></think></p>"),
            ("use `<b>` and ``a`<b>`` <b>", "<p>use <code><b></code> and <code>a`<b></code> <b></p>"),
            ("```html\n<b>&\n```\n<b>", "<pre><code><b>&\n</code></pre><p><b></p>"),
            ("![x](http://a.b/x.png) [y](http://a.b)", "<p>![x](http://a.b/x.png) [y](http://a.b)</p>"),
            ("**粗** 好", "<p><strong>粗</strong> 好</p>"),
            ("1. a\n2. b", "<ol><li>a</li><li>b</li></ol>"),
        ],
    )
    def test_markdown_acts_and_html_does_not(self, text, shown):
        rendered = as_html(text)
        assert html.unescape(rendered) == f"<div>{shown}</div>"
        tags = re.findall(r"</?(\w+)[^>]*>", rendered)  # of HTML: what the text spells is in numeric references
        assert set(tags) <= set("div p br code pre strong ol li".split()) and not re.search(r"[`*\[\]$\n]", rendered)

    def test_both_languages_have_all_words(self):
        assert ENGLISH.keys() == CHINESE.keys()


def test_both_columns_are_undone_together():
    session = WebSession(ChatSession())
    asked = {text: (Turn("human", text),) for text in "abc"}
    session.add(asked["a"], Turn("model", "1"), None)
    session.add(asked["b"], Turn("model", "2"), Turn("model", "3"))
    kept, compared = session.columns(asked["c"], {"tuned": Turn("model", "4"), "base": None})
    assert [one["content"] for one in kept] == [as_html(text) for text in ("a", "1", "b", "2", "c", "4")]
    assert [one["content"] for one in compared] == [as_html(text) for text in ("b", "3", "c", "…")]
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
            with socket.create_connection(("127.0.0.1", port)) as held:
                held.sendall(b"GET / HTTP/1.1\r\nHost: 127")  # a client that sends no more
                server.send_signal(signal.SIGINT)
                try:
                    rest, _ = server.communicate(timeout=SECONDS_TO_END)
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


HOSTILE = [
    r"\`<img src=http://evil.test/a.png>\`", "![x](http://evil.test/b.png)", "<svg onload=fetch('http://evil.test/c')>",
    "```x\n```` <img src=http://evil.test/d.png>\n```", "```mermaid\ngraph TD; A[<img src=http://evil.test/e>]\n```",
    "[x](javascript:fetch('http://evil.test/f')) <javascript:alert(1)>", "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    "<!-- --!><img src=http://evil.test/g> -->", "$$\\href{http://evil.test/h}{x} \\includegraphics{http://evil.test/i}$$",
    "<style>@import 'http://evil.test/j'</style>", "&lt;img src=http://evil.test/k&gt; &#60;img src=http://evil.test/l&#62;",
    "[r]: http://evil.test/m\n![x][r]", "<table><td background=http://evil.test/n>", "a\n\n    <img src=http://evil.test/o>",
    "| <img src=http://evil.test/p> |\n|-|\n| `<img src=http://evil.test/q>` |", "<math><mi xlink:href=http://evil.test/r>",
]  # fmt: skip
ACTIVE = "img, svg, a, iframe, script, style, object, form, input, link, video, math, td[background], .mermaid, .katex"


@pytest.mark.browser
def test_hostile_text_builds_and_fetches_nothing(address):
    with visiting(address) as page:
        for number, text in enumerate([*HOSTILE, "\n\n".join(HOSTILE), "**bold** `code`"]):
            send(page, text)
            wait_until_answered(page)
            shown = page.locator("#kept [data-testid=user]").last
            assert shown.locator(ACTIVE).count() == 0, text
            assert number >= len(HOSTILE) or "evil" in shown.inner_text() or "data:" in shown.inner_text()
            last = (shown.locator("strong").count(), shown.locator("code").count())
            page.click("#reset")
            page.wait_for_function("!document.querySelector('#kept [data-testid=bot]')")
        assert last == (1, 1)


@pytest.mark.browser
def test_only_the_page_itself_is_answered(address):
    def status(path: str = "/", method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("content-security-policy", "")

    code, policy = status()
    assert code == 200 and "default-src 'none'" in policy and "http" not in policy
    own = address.removeprefix("http://")
    for host, origin, expected in [
        ("localhost:1", None, 200), ("[::1]:7860", None, 200), (own, address, 200), ("evil.test", None, 403),
        ("127.0.0.1.evil.test", None, 403), (own, "http://evil.test", 403), (own, "null", 403), ("[", None, 403),
        ("", None, 403),
    ]:  # fmt: skip
        assert status(Host=host, **({"Origin": origin} if origin else {}))[0] == expected, (host, origin)
    assert status("/gradio_api/upload", "POST", b"x")[0] == 403
    assert status("/gradio_api/queue/join", "POST", b"x" * 5_000_000)[0] == 413
    assert status("/gradio_api/file=/etc/passwd")[0] == 403


def test_what_the_sliders_do_not_allow_is_refused():
    for temperature, top_p, seed in [
        (math.nan, 1, ""),
        (math.inf, 1, ""),
        (1, math.nan, ""),
        (1, 0, ""),
        (1, 1, "9" * 30),
    ]:
        with pytest.raises(ConfigError):
            _sampling_params(20, temperature, top_p, seed)
    with pytest.raises(ConfigError, match="characters"):
        _check_lengths("a" * (MAX_CHARACTERS + 1), None)


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
def test_an_example_is_asked_and_the_conversation_saved_as_a_row(address):
    with visiting(address) as page:
        example = page.locator("#examples button").first
        question = example.inner_text()
        example.click()
        wait_until_answered(page)
        assert texts(page, by="user") == [question] and not page.locator("#examples").is_visible()
        with page.expect_download(timeout=LONG_MS) as saved:
            page.click("#save")
        row = json.loads(Path(saved.value.path()).read_text("utf-8"))
        assert [turn["from"] for turn in row["conversations"]] == ["human", "model"]
        assert row["conversations"][0]["value"] == question and saved.value.suggested_filename.endswith(".jsonl")


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
