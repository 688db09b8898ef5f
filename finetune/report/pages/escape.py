"""Text that cannot act on a page: escaped, shapeless characters named, each turn in its own direction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune.report.pages.row_cards import ROWS, bars
from finetune.run_dir.data_samples import TurnSample

# Without a shape, or changing how others are read: controls, soft hyphen, zero widths, directions, hidden tags.
# The joiner inside an emoji and the tags behind a flag belong to their picture and stay.
SHAPELESS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    "|(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]+"
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Of every page: `title`, `mark`, `policy` and `style`; two switches that the style reads; then its own block.
FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{{ mark|safe }}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="{{ policy|safe }}">
<title>{{ title|harmless }}</title>
<style>{{ style|safe }}</style>
</head>
<body{% if every is defined and every is not none %} data-every="{{ every }}"{% endif %}>
<input type="checkbox" id="mono" class="choice"><input type="checkbox" id="bare" class="choice">
{% block page %}{% endblock %}
</body>
</html>
"""
SCRIPTS = (("ja", "[\u3040-\u30ff]"), ("ko", "[\uac00-\ud7af]"), ("zh", "[\u3400-\u9fff]"))


def name_of(character: str) -> str:
    """What to show for a character that has no shape.

    >>> name_of("\\x1b")
    'U+001B'
    """
    return f"U+{ord(character):04X}"


def templates(more: Mapping[str, str] | None = None) -> Any:
    """The Jinja environment of all pages: what is not marked as safe is escaped. `frame` is around each page, `rows`
    has the macros of `rows.py`.

    `more` are templates of one page, by name.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader({"frame": FRAME, "rows": ROWS, **(more or {})}),
    )
    environment.filters.update(
        harmless=visible_text, between=_between, language=language, bars=bars, thousands="{:,}".format
    )
    return environment


def visible_text(text: str) -> Any:
    """Escaped text with shapeless characters named; `_between` and this are the only makers of markup."""
    from markupsafe import Markup, escape

    def named(match: re.Match[str]) -> str:
        return "".join(f'<i class="odd">{name_of(one)}</i>' for one in match.group())

    return Markup(SHAPELESS.sub(named, str(escape(text))))


def _between(text: str) -> Any:
    """The same for what a template writes between turns, on one line: line feeds are marked."""
    from markupsafe import Markup

    return Markup(str(visible_text(text)).replace("\n", '<span class="lf">\n</span>'))


def language(said: TurnSample | str) -> str:
    """What to tell the browser, so that it picks the right shapes; empty where the script does not decide."""
    text = said if isinstance(said, str) else "".join(piece.text for piece in said.pieces)
    return next((code for code, script in SCRIPTS if re.search(script, text)), "")
