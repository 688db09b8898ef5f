"""The page of `finetune preview`: a data set and some of its rows. It has no script, and its policy forbids any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.report.pages.escape import POLICY, templates
from finetune.report.pages.page_files import PREVIEW, mark
from finetune.report.pages.page_style import STYLE
from finetune.run_dir.data_samples import RowSample


@dataclass(frozen=True)
class PreviewPage:
    """A data set and some of its rows.

    `facts` are (label, value) pairs, `lengths` counts examples in equal bins from 0 to `longest` tokens, `not_kept`
    are (source, row, status, reason) of the first of `num_not_kept` rows that were not kept whole.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    lengths: Sequence[int]
    longest: int
    shown: str
    cards: Sequence[RowSample]
    not_kept: Sequence[tuple[str, int, str, str]]
    num_not_kept: int


def render_page(page: PreviewPage) -> str:
    """The page as one self-contained HTML document."""
    template = templates().from_string(PAGE)
    return template.render(page=page, title=page.title, mark=mark(PREVIEW), policy=POLICY, style=STYLE)


PAGE = """{% extends "frame" %}
{% block page %}
{% from "rows" import card, histogram, legend, not_kept, not_kept_count %}
<div class="page">
<h1><small>Conversations as the model reads them</small>{{ title|harmless }}</h1>
<section class="overview" aria-label="Summary">
<dl>
{% for label, value in page.facts %}
<dt>{{ label }}</dt><dd>{{ value|harmless }}</dd>
{% endfor %}
</dl>
{% if page.longest %}
{{ histogram(page.lengths, page.longest) }}
{% endif %}
</section>
{{ legend() }}
<h2>{{ page.shown }}</h2>
<main>
{% for one in page.cards %}
{{ card(one, loop.index0) }}
{% endfor %}
</main>
{% if page.not_kept %}
<h2>{{ not_kept_count(page.not_kept|length, page.num_not_kept) }}</h2>
{{ not_kept(page.not_kept) }}
{% endif %}
</div>
{% endblock %}
"""
