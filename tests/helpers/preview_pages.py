"""Preview pages of hostile and multilingual conversations, and a strict parser of them."""

from dataclasses import replace
from html.parser import HTMLParser

from finetune.chat_templates.text_segments import Segment
from finetune.report import html_pages
from finetune.run_dir.data_samples import RowSample, TurnSample
from finetune.run_dir.eval_results import ResultSection, ResultTable
from tests.helpers.reported import SUMMARY

HOSTILE = "<script>document.title='gone'</script></style><img src=x onerror=alert(1)> \"quoted\" 'too' &amp; {{ 7*7 }}"


CHINESE = "杭州是浙江省的省会。\n西湖十景闻名中外 🏙️👩‍👩‍👧 🏴\U000e0067\U000e0062\U000e007f"


CODE = "```python\nfor i in range(3):\n\tprint(i)   # squares\n```\n"


STORY = "Once upon a time there was a fox. " * 20


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


def a_page(cards=CARDS, **changes) -> html_pages.Preview:
    values = {
        "title": "rows.json",
        "facts": {"Model": "M <b>", "Format": "chatml"},
        "summary": replace(SUMMARY, length_histogram=[0, 3, 1], longest=8),
        "shown": "All 7 rows",
        "cards": cards,
        "not_kept": [("rows.json", 6, "dropped", "too <long>")],
    }
    return html_pages.Preview(**{**values, **changes})


STATISTICS = ResultSection(
    "Statistics",
    ["1 of 7 rows hold 60.0% of the supervised tokens"],
    [
        ResultTable(
            "Tokens by role", ["Source", "Tokens", "Letters"], [["rows.json: <b>", "1,234", "Latin 60%, CJK 40%"]] * 3
        )
    ],
    notes=["not looked for: mmlu"],
)


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
