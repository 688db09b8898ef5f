"""The preview page in a real Chromium."""

import json
from html.parser import HTMLParser

import pytest

from finetune.report import html_pages
from tests.helpers.browsers import (
    LEARNED_DARK,
    LEARNED_LIGHT,
    PAPER_DARK,
    PAPER_LIGHT,
    count,
    open_page,
    pixels,
    run_browser,
)
from tests.helpers.preview_pages import CARDS, STATISTICS, Document, a_page


@pytest.mark.browser
@pytest.mark.parametrize(
    ("flags", "paper", "learned"),
    [((), PAPER_LIGHT, LEARNED_LIGHT), (("--blink-settings=preferredColorScheme=0",), PAPER_DARK, LEARNED_DARK)],
    ids=["light", "dark"],
)
def test_what_a_browser_draws(tmp_path, flags, paper, learned):
    width, height = 700, 2400
    (tmp_path / "page.html").write_text(html_pages.render_preview(a_page()), encoding="utf-8")
    run_browser(
        tmp_path / "profile", *flags, f"--window-size={width},{height}", f"--screenshot={tmp_path / 'page.png'}",
        (tmp_path / "page.html").as_uri(),
    )  # fmt: skip
    rows = pixels(tmp_path / "page.png")
    assert (len(rows), len(rows[0])) == (height, 3 * width)
    assert rows[2][:3] == bytes(paper)
    # The story alone fills ten lines of 500 by 25 pixels, less what its letters cover.
    assert count(rows, learned) > 60_000
    assert count(rows[: height // 3], learned) > 1_000
    assert len(set(rows[-200:])) > 20, "the page ends too soon"


MEASURE = """<!doctype html><meta charset="utf-8"><body>
<iframe id="frame" src="page.html" style="border:0;width:400px;height:800px"></iframe>
<pre id="found"></pre><script>
frame.onload = () => {
  const page = frame.contentDocument, list = selector => [...page.querySelectorAll(selector)];
  const shown = list(".text").map(one => one.getBoundingClientRect());
  found.textContent = JSON.stringify({
    title: page.title, cards: list(".card").length, scripts: list("script, img").length,
    texts: list(".text").map(one => one.textContent),
    width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight,
    narrowest: Math.min(...shown.map(one => one.width)), lowest: Math.min(...shown.map(one => one.height)),
    directions: list(".text").map(one => getComputedStyle(one).direction),
    contrast: getComputedStyle(list(".supervised")[0]).backgroundColor,
  });
};
</script>
"""


@pytest.mark.browser
def test_what_a_browser_understands(tmp_path):
    (tmp_path / "page.html").write_text(html_pages.render_preview(a_page()), encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE, encoding="utf-8")
    dom = run_browser(
        tmp_path / "profile", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "measure.html").as_uri()
    )
    found = json.loads(Found(dom).text)
    expected = Document(html_pages.render_preview(a_page())).inside("text")
    assert found["texts"] == expected and len(expected) == 14
    assert (found["title"], found["cards"], found["scripts"]) == ("rows.json", len(CARDS), 1)
    # A phone's width holds it without scrolling sideways, and no text is squeezed away.
    assert found["width"] == 400
    assert found["narrowest"] > 300 and found["lowest"] > 20
    assert 2_000 < found["height"] < 6_000
    assert found["directions"].count("rtl") == 1
    assert found["contrast"] == "rgb({}, {}, {})".format(*LEARNED_LIGHT)


@pytest.mark.browser
def test_rows_are_filtered_and_labels_are_in_the_language_of_the_reader(tmp_path):
    (tmp_path / "page.html").write_text(html_pages.render_preview(a_page(statistics=STATISTICS)), encoding="utf-8")
    with open_page(width=390, offline=True, locale="zh-CN") as page:
        page.goto((tmp_path / "page.html").as_uri())
        for label, rows in (
            ("截断", ["第 4 行"]),
            ("丢弃", ["第 6 行"]),
            ("全部", [f"第 {row} 行" for row in range(7)]),
        ):
            page.locator(".filter label", has_text=label).click()
            assert page.locator(".card h3:visible").all_inner_texts() == rows
            assert page.locator("tr.row:visible").count() == (label != "截断")
        assert page.locator(".text").first.inner_text() == "Who are you? <|im_end|>"
        assert page.locator(".reason").last.inner_text().startswith("the context before")
        assert {"统计", "按角色的 token", "1 / 7 行占有 60.0% 的计入损失的 token"} <= set(
            page.locator("h2, h3, p").all_inner_texts()
        )


@pytest.mark.browser
def test_statistics_in_a_browser(tmp_path):
    html = html_pages.render_preview(a_page(statistics=STATISTICS))
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    measure = MEASURE.replace(
        "title: page.title",
        """title: list("section")[1].innerText, cells: list(".wide td, .wide th").map(
      one => [one.innerText, one.getBoundingClientRect().right]), sides: list(".wide").map(
      one => one.getBoundingClientRect().right)""",
    )
    (tmp_path / "measure.html").write_text(measure, encoding="utf-8")
    dom = run_browser(
        tmp_path / "profile", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "measure.html").as_uri()
    )
    found = json.loads(Found(dom).text)
    for shown in ("Statistics", "hold 60.0% of the supervised tokens", "Tokens by role", "not looked for: mmlu"):
        assert shown in found["title"]
    assert [text for text, _ in found["cells"]][:6] == [
        "Source",
        "Tokens",
        "Letters",
        "rows.json: <b>",
        "1,234",
        "Latin 60%, CJK 40%",
    ]
    assert found["width"] == 400 and max(found["sides"]) <= 400 and len(found["cells"]) == 12


class Found(HTMLParser):
    """The text of the `pre`."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.inside = "", False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "pre"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.text += data if self.inside else ""
