"""The page stands alone, shows every text exactly, and nothing in the data acts on it."""

import copy
import re

import pytest

from finetune.chat_templates import Renderer, select_chat_format
from finetune.chat_templates.text_segments import Segment, segmenter
from finetune.conversation import Conversation, ToolCall, Turn
from finetune.dataset.data_summary import DataTally
from finetune.report import html_pages
from finetune.run_dir.data_samples import TurnSample, sample_of
from finetune.utils.errors import ConfigError, StorageError
from tests.helpers.preview_pages import CARDS, END, HOSTILE, Document, a_page, card, turns


def test_every_text_stands_on_the_page_exactly():
    page = Document(html_pages.render_preview(a_page()))
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
    assert page.inside("supervised")[1:] == [text.removesuffix("<|im_end|>") for text in expected[1::2]]
    assert page.inside("between")[:2] == ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>"]
    assert page.count("card") == len(CARDS)
    assert (page.inside("badge dropped"), page.inside("reason")[-1]) == (["dropped"] * 2, CARDS[-1].reason)
    assert page.inside("part") == ["Window 1 of 2", "Window 2 of 2"]


def test_tool_results_and_plain_text_have_their_roles():
    parts = [
        TurnSample("tool", [Segment("context", '{"degrees": 7}', 1)]),
        TurnSample("text", [Segment("learned", "Once", 0)]),
    ]
    page = Document(html_pages.render_preview(a_page([card(0, "kept", None, parts)])))
    assert page.inside("role") == ["tool", "text"] and page.inside("text") == ['{"degrees": 7}', "Once"]
    assert page.inside("supervised") == ["supervised", "Once"]
    assert page.count("tool") == page.count("plain") == 1


def test_calls_and_reasoning_are_supervised_and_declarations_and_results_are_not(smol_tokenizer):
    chat_format, _ = select_chat_format(copy.deepcopy(smol_tokenizer), "hermes")
    call = ToolCall("find_book", {"title": "The Sea"}, "a1")
    conversation = Conversation(
        (
            Turn("human", "Have you got it?"),
            Turn("model", "", tool_calls=(call,)),
            Turn("tool", "shelf 4", tool_call_id="a1"),
            Turn("model", "On shelf 4.", reasoning="It is there."),
        ),
        tools=({"type": "function", "function": {"name": "find_book", "parameters": {"type": "object"}}},),
    )
    (rendering,) = Renderer(chat_format, 400).render_all([conversation])
    page = Document(html_pages.render_preview(a_page([sample_of(rendering, segmenter(chat_format))])))
    assert page.inside("role")[-4:] == ["human", "model", "tool", "model"]
    facts = ["context", "calls find_book, supervised", "context", "reasoning, supervised"]
    assert page.inside("who")[-4:] == [
        f"{role}\n{fact}" for role, fact in zip(page.inside("role")[-4:], facts, strict=True)
    ]
    learned = "\n".join(page.inside("supervised")[1:])
    assert '{"name": "find_book", "arguments": {"title": "The Sea"}}' in learned and "On shelf 4." in learned
    assert (
        "It is there." in learned and "shelf 4" not in learned.replace("On shelf 4.", "") and "<tools>" not in learned
    )
    shown = "\n".join(page.inside("between") + page.inside("text"))
    assert '"name": "find_book", "parameters"' in shown and page.inside("text")[-2].strip().startswith("shelf 4")


def test_nothing_in_the_data_becomes_an_element_and_nothing_is_fetched():
    html = html_pages.render_preview(a_page(title=HOSTILE, shown="All", facts={"Model": HOSTILE}))
    page = Document(html)
    tags = {tag for tag, _ in page.elements}
    assert tags <= set(
        "html head meta title style body input div h1 small section dl dt dd figure svg rect span figcaption p label "
        "mark bdi h2 main article header h3 table tr th td i script".split()
    )
    assert "mark" in tags
    assert not [name for _, attributes in page.elements for name in attributes if name in ("src", "href", "onerror")]
    assert html.count("</style>") == 1 and "url(" not in html and "@import" not in html
    policies = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    directives = dict(one.strip().split(" ", 1) for one in policies[0].split(";"))
    assert directives["default-src"] == "'none'" and re.fullmatch(r"'sha256-[\w+/=]+'", directives["script-src"])
    assert html.count("<script>") == 1 and set(directives) == {
        *"default-src style-src script-src base-uri form-action".split()
    }


def test_each_turn_keeps_its_direction_and_names_its_language():
    page = Document(html_pages.render_preview(a_page()))
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
    page = Document(html_pages.render_preview(a_page([card(0, "kept", None, turns(text, "ok"))])))
    assert page.inside("text")[0] == (text if shown is None else shown)


def test_bars_cover_all_lengths_once():
    page = Document(html_pages.render_preview(a_page()))
    titles = [text for tag, _, text in page.texts if tag == "title"][1:]
    assert titles == ["0 to 2 tokens: 0 examples", "3 to 5 tokens: 3 examples", "6 to 8 tokens: 1 examples"]
    heights = [float(one["height"]) for tag, one in page.elements if tag == "rect"]
    assert heights == [0, 96, 32]


def test_a_data_set_without_examples_or_losses():
    html = html_pages.render_preview(a_page([CARDS[6]], summary=DataTally().summary(), not_kept=[]))
    assert "<svg" not in html and "<h2>Rows not kept whole" not in html


INKS = {
    "ink": ("card", "paper"), "soft": ("card", "paper"), "supervised-ink": ("supervised",), "pill-ink": ("pill",),
    "end-ink": ("end",), "human": ("card",), "model": ("card",), "system": ("card",), "cut-ink": ("cut",),
    "split-ink": ("split",), "dropped-ink": ("dropped",), "kept-ink": ("kept",), "odd": ("card", "supervised"),
}  # fmt: skip


def test_every_ink_can_be_read_on_its_ground_in_light_and_dark():
    """WCAG 2 level AA: a contrast of at least 4.5 between the relative luminances."""
    light, dark = html_pages.asset("base.css").split("* { box-sizing")[0].split("@media")
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
    html_pages.write_page(path, html_pages.render_preview(a_page()))
    html_pages.write_page(path, html_pages.render_preview(a_page(title="again")))
    assert "<title>again</title>" in path.read_text("utf-8")
    assert [one.name for one in path.parent.iterdir()] == ["page.html"]
    path.write_text("my notes")
    with pytest.raises(ConfigError, match="was not made by finetune preview and is not replaced"):
        html_pages.write_page(path, "x")
    with pytest.raises(ConfigError, match="cannot be replaced"):
        html_pages.check_replaceable(tmp_path)
    assert path.read_text() == "my notes"


def test_a_page_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--html .*file/page.html: .*file is a file, not a folder"):
        html_pages.check_replaceable(tmp_path / "file" / "page.html")
    with pytest.raises(ConfigError, match="name too long"):
        html_pages.check_replaceable(tmp_path / ("x" * 300))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(StorageError, match="--html .*page.html: no permission to write"):
        html_pages.check_replaceable(tmp_path / "page.html")
