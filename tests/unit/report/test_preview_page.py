"""The page stands alone, shows every text exactly, and nothing in the data acts on it."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from finetune.chat_templates.text_segments import Segment
from finetune.report import pages
from finetune.run_dir.data_samples import RowSample, TurnSample
from finetune.utils.errors import ConfigError, StorageError
from tests.helpers.browsers import browser_path

HOSTILE = "<script>document.title='gone'</script></style><img src=x onerror=alert(1)> \"quoted\" 'too' &amp; {{ 7*7 }}"
CHINESE = "杭州是浙江省的省会。\n西湖十景闻名中外 🏙️👩‍👩‍👧 🏴\U000e0067\U000e0062\U000e007f"
CODE = "```python\nfor i in range(3):\n\tprint(i)   # squares\n```\n"
STORY = "Once upon a time there was a fox. " * 20
LEARNED_LIGHT, LEARNED_DARK = (0xD5, 0xF2, 0xDE), (0x12, 0x3A, 0x25)
PAPER_LIGHT, PAPER_DARK = (0xF5, 0xF6, 0xF8), (0x0F, 0x12, 0x16)


def piece(kind: str, text: str) -> Segment:
    return Segment(kind, text, None)


START, END = piece("control", "<|im_start|>"), piece("learned_control", "<|im_end|>")


def turns(human: str, model: str, *, ended: bool = True) -> list[TurnSample]:
    return [
        TurnSample(None, [START, piece("context", "user\n")]),
        TurnSample("human", [piece("context", human)]),
        TurnSample(None, [piece("control", "<|im_end|>"), piece("context", "\n"), START]),
        TurnSample("model", [piece("learned", model), *[END] * ended]),
    ]


def card(row: int, status: str, reason: str | None, *examples: list[TurnSample]) -> RowSample:
    return RowSample("rows.json", row, f"id {row}", status, 40 * len(examples), 10 * len(examples), reason, examples)


CARDS = (
    card(0, "kept", None, turns("Who are you? <|im_end|>", "I am Nori, made by Tidepool.")),
    card(1, "kept", None, turns("请介绍杭州。", CHINESE)),
    card(2, "kept", None, turns("Write a loop.", CODE)),
    card(3, "kept", None, turns(HOSTILE, HOSTILE)),
    card(4, "cut", "700 tokens: the first model turn keeps its first 145 tokens", turns("Go on.", STORY, ended=False)),
    card(5, "split", "305 tokens: 2 windows", turns("One?", "First."), turns("Two?", "مرحبا بالعالم")),
    card(6, "dropped", "the context before the first model turn alone fills 180"),
)


def a_page(cards=CARDS, **changes) -> pages.PreviewPage:
    values = {
        "title": "rows.json",
        "facts": [("Model", "M <b>"), ("Format", "chatml")],
        "lengths": [0, 3, 1],
        "longest": 8,
        "shown": "All 7 rows",
        "cards": cards,
        "not_kept": [("rows.json", 6, "dropped", "too <long>")],
        "num_not_kept": 1,
    }
    return pages.PreviewPage(**{**values, **changes})


class Document(HTMLParser):
    """Elements with their attributes, and the text inside each turn and mark."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.open: list[tuple[str, str, list[str]]] = []
        self.texts: list[tuple[str, str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attributes).get("class", ""), []))

    def handle_endtag(self, tag):
        name, kind, parts = self.open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        self.texts.append((tag, kind, "".join(parts)))

    def handle_data(self, data):
        for _, _, parts in self.open:
            parts.append(data)

    def inside(self, kind: str) -> list[str]:
        return [text for _, found, text in self.texts if found == kind]

    def count(self, kind: str) -> int:
        return sum(kind in dict(attributes).get("class", "").split() for _, attributes in self.elements)


def test_every_text_stands_on_the_page_exactly():
    page = Document(pages.render_page(a_page()))
    assert page.open == []
    expected = [
        text + "<|im_end|>" * (turn.role == "model" and turn.pieces[-1] is END)
        for one in CARDS
        for example in one.examples
        for turn in example
        if turn.role
        for text in [turn.pieces[0].text]
    ]
    assert page.inside("text") == expected
    assert len(expected) == 14
    assert page.inside("learned")[1:] == [text.removesuffix("<|im_end|>") for text in expected[1::2]]
    assert page.inside("between")[:2] == ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>"]
    assert page.count("card") == len(CARDS)
    assert (page.inside("badge dropped"), page.inside("reason")[-1]) == (["dropped"] * 2, CARDS[-1].reason)
    assert page.inside("part") == ["Window 1 of 2", "Window 2 of 2"]


def test_nothing_in_the_data_becomes_an_element_and_nothing_is_fetched():
    html = pages.render_page(a_page(title=HOSTILE, shown="All", facts=[("Model", HOSTILE)]))
    page = Document(html)
    tags = {tag for tag, _ in page.elements}
    assert tags <= set(
        "html head meta title style body input div h1 small section dl dt dd figure svg rect span figcaption p label "
        "mark bdi h2 main article header h3 table tr th td i".split()
    )
    assert "mark" in tags
    assert not [name for _, attributes in page.elements for name in attributes if name in ("src", "href", "onerror")]
    assert html.count("</style>") == 1 and "url(" not in html and "@import" not in html
    policies = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_each_turn_keeps_its_direction_and_names_its_language():
    page = Document(pages.render_page(a_page()))
    attributes = [one for tag, one in page.elements if one.get("class") == "text"]
    assert {one["dir"] for one in attributes} == {"auto"}
    assert [one["lang"] for one in attributes[:4]] == ["", "", "zh", "zh"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b\x1b[31m\r\n", "aU+0000bU+001B[31mU+000D\n"),
        ("\u202egnp.exe\u202c \u200b\ufeff\xad", "U+202Egnp.exeU+202C U+200BU+FEFFU+00AD"),
        ("hidden\U000e0041\U000e0042.", "hiddenU+E0041U+E0042."),
        ("👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f \u200c é ✈\ufe0f\t", None),
    ],
)
def test_characters_without_a_shape_are_named(text, shown):
    page = Document(pages.render_page(a_page([card(0, "kept", None, turns(text, "ok"))])))
    assert page.inside("text")[0] == (text if shown is None else shown)


def test_bars_cover_all_lengths_once():
    page = Document(pages.render_page(a_page(lengths=[0, 3, 1], longest=8)))
    titles = [text for tag, _, text in page.texts if tag == "title"][1:]
    assert titles == ["0 to 2 tokens: 0 examples", "3 to 5 tokens: 3 examples", "6 to 8 tokens: 1 examples"]
    heights = [float(one["height"]) for tag, one in page.elements if tag == "rect"]
    assert heights == [0, 96, 32]


def test_a_data_set_without_examples_or_losses():
    html = pages.render_page(a_page([CARDS[6]], lengths=[0] * 24, longest=0, not_kept=[], num_not_kept=0))
    assert "<svg" not in html and "not kept whole" not in html


INKS = {
    "ink": ("card", "paper"), "soft": ("card", "paper"), "learned-ink": ("learned",), "pill-ink": ("pill",),
    "end-ink": ("end",), "human": ("card",), "model": ("card",), "system": ("card",), "cut-ink": ("cut",),
    "split-ink": ("split",), "dropped-ink": ("dropped",), "kept-ink": ("kept",), "odd": ("card", "learned"),
}  # fmt: skip


def test_every_ink_can_be_read_on_its_ground_in_light_and_dark():
    """WCAG 2 level AA: a contrast of at least 4.5 between the relative luminances."""
    light, dark = pages.STYLE.split("* { box-sizing")[0].split("@media")
    for theme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): #([0-9a-f]{3,6})", theme))
        for ink, grounds in INKS.items():
            for ground in grounds:
                darker, lighter = sorted(map(luminance, (colours[ink], colours[ground])))
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (ink, ground)


def luminance(colour: str) -> float:
    colour = "".join(2 * digit for digit in colour) if len(colour) == 3 else colour
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_page_replaces_a_page_and_no_other_file(tmp_path):
    path = tmp_path / "new" / "page.html"
    pages.write_page(path, pages.render_page(a_page()))
    pages.write_page(path, pages.render_page(a_page(title="again")))
    assert "<title>again</title>" in path.read_text("utf-8")
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]
    path.write_text("my notes")
    with pytest.raises(ConfigError, match="was not made by finetune preview and is not replaced"):
        pages.write_page(path, "x")
    with pytest.raises(ConfigError, match="cannot be replaced"):
        pages.check_replaceable(tmp_path)
    assert path.read_text() == "my notes"


def test_a_page_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        pages.write_page(tmp_path / "file" / "page.html", "x")
    with pytest.raises(ConfigError, match="name too long"):
        pages.check_replaceable(tmp_path / ("x" * 300))


# ---- in a real browser


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


@pytest.mark.browser
@pytest.mark.parametrize(
    ("flags", "paper", "learned"),
    [((), PAPER_LIGHT, LEARNED_LIGHT), (("--blink-settings=preferredColorScheme=0",), PAPER_DARK, LEARNED_DARK)],
    ids=["light", "dark"],
)
def test_what_a_browser_draws(tmp_path, flags, paper, learned):
    width, height = 700, 2000
    (tmp_path / "page.html").write_text(pages.render_page(a_page()), encoding="utf-8")
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
    contrast: getComputedStyle(list(".learned")[0]).backgroundColor,
  });
};
</script>
"""


@pytest.mark.browser
def test_what_a_browser_understands(tmp_path):
    (tmp_path / "page.html").write_text(pages.render_page(a_page()), encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE, encoding="utf-8")
    dom = run_browser(
        tmp_path / "profile", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "measure.html").as_uri()
    )
    found = json.loads(Found(dom).text)
    expected = Document(pages.render_page(a_page())).inside("text")
    assert found["texts"] == expected and len(expected) == 14
    assert (found["title"], found["cards"], found["scripts"]) == ("rows.json", len(CARDS), 0)
    # A phone's width holds it without scrolling sideways, and no text is squeezed away.
    assert found["width"] == 400
    assert found["narrowest"] > 300 and found["lowest"] > 20
    assert 2_000 < found["height"] < 6_000
    assert found["directions"].count("rtl") == 1
    assert found["contrast"] == "rgb({}, {}, {})".format(*LEARNED_LIGHT)


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
