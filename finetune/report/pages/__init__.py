"""HTML pages that stand alone: no network, light and dark; made of plain values.

What stands in the data cannot act on a page: everything is escaped, characters without a shape of their own are named,
each turn keeps its own direction, and each page's policy forbids requests and all scripts but its own.
"""

from __future__ import annotations

from finetune.report.pages.escape import POLICY, SHAPELESS, language, name_of, templates, visible_text
from finetune.report.pages.page_files import PREVIEW, REPORT, check_replaceable, mark, write_page
from finetune.report.pages.page_style import STYLE
from finetune.report.pages.preview_page import PreviewPage, render_page

__all__ = [
    "POLICY",
    "PREVIEW",
    "REPORT",
    "SHAPELESS",
    "STYLE",
    "PreviewPage",
    "check_replaceable",
    "visible_text",
    "language",
    "mark",
    "name_of",
    "render_page",
    "templates",
    "write_page",
]
