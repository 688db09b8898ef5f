"""HTML pages that stand alone: no network, light and dark; made of plain values.

What stands in the data cannot act on a page: everything is escaped, characters without a shape of their own are named,
each turn keeps its own direction, and each page's policy forbids requests and all scripts but its own.
"""

from __future__ import annotations

from finetune.pages.files import PREVIEW, REPORT, check_replaceable, mark, write_page
from finetune.pages.preview import Page, render_page
from finetune.pages.rows import Card, Piece, Turn
from finetune.pages.style import STYLE
from finetune.pages.text import POLICY, SHAPELESS, harmless, language, name_of, templates

__all__ = [
    "POLICY",
    "PREVIEW",
    "REPORT",
    "SHAPELESS",
    "STYLE",
    "Card",
    "Page",
    "Piece",
    "Turn",
    "check_replaceable",
    "harmless",
    "language",
    "mark",
    "name_of",
    "render_page",
    "templates",
    "write_page",
]
