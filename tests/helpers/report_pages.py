"""A report, parsed."""

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements with their attributes, scripts, and all text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text, self.inside = "", ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag if tag in ("script", "style") else ""
        self.text += " " if tag in ("td", "th") else ""
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
        elif not self.inside:
            self.text += data

    def numbers(self) -> dict:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "numbers"))

    def sections(self) -> list[str]:
        return [attributes.get("aria-label") for tag, attributes in self.elements if tag == "section"]

    def policy(self) -> str:
        return next(attributes["content"] for _, attributes in self.elements if "http-equiv" in attributes)
