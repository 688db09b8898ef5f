"""Rows of data on a page: the macros that draw them and their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BAR_WIDTH, CHART_HEIGHT = 20, 96


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram, in units of the drawing."""

    x: int
    y: float
    height: float
    label: str


def bars(counts: Sequence[int], longest: int) -> list[Bar]:
    """Counts in equal bins from 0 to `longest` tokens, as bars."""
    highest = max(counts, default=0)
    found = []
    for number, count in enumerate(counts):
        first = -(-number * (longest + 1) // len(counts))
        last = -(-(number + 1) * (longest + 1) // len(counts)) - 1
        height = max(2.0, CHART_HEIGHT * count / highest) if count else 0.0
        label = f"{first:,} to {max(first, last):,} tokens: {count:,} examples"
        found.append(Bar(number * BAR_WIDTH, CHART_HEIGHT - height, round(height, 2), label))
    return found


ROWS = """{% macro piece(one, newlines) %}
{%- if one.kind in ("control", "learned_control") -%}
<bdi class="control{{ ' end' if one.kind == 'learned_control' }}{{ ' unread' if not one.read }}" dir="ltr"
{%- if not one.read %} title="learned here, not read"{% endif %}>{{ one.text|harmless }}</bdi>
{%- elif one.kind == "learned" -%}
<mark class="learned">{{ one.text|harmless }}</mark>
{%- else -%}
<span>{{ one.text|between if newlines else one.text|harmless }}</span>
{%- endif -%}
{% endmacro %}
{% macro card(one, number) %}
<article class="card {{ one.status }}" id="row-{{ number }}">
<header>
<h3>Row {{ one.row }}</h3>
<span class="badge {{ one.status }}">{{ one.status }}</span>
<span>{{ one.source|harmless }}{% if one.id is not none %}, id {{ one.id|harmless }}{% endif %}</span>
<span class="numbers">{{ one.tokens|thousands }} tokens, {{ one.supervised|thousands }} learned
{%- if one.tokens %} ({{ "%.1f"|format(100 * one.supervised / one.tokens) }}%){% endif %}</span>
{% if one.reason %}
<span class="reason">{{ one.reason|harmless }}</span>
{% endif %}
</header>
{% for example in one.examples %}
<section class="example">
{% if one.examples|length > 1 %}
<p class="part">Window {{ loop.index }} of {{ one.examples|length }}</p>
{% endif %}
{% for turn in example %}
{% if turn.role is none %}
<div class="between" dir="ltr">{% for each in turn.pieces %}{{ piece(each, true) }}{% endfor %}</div>
{% else %}
<div class="turn {{ turn.role }}"><div class="role">{{ turn.role }}</div>
<div class="text" dir="auto" lang="{{ turn|language }}">
{%- for each in turn.pieces %}{{ piece(each, false) }}{% endfor -%}
</div></div>
{% endif %}
{% endfor %}
</section>
{% endfor %}
{% if one.unshown %}
<p class="unshown">{{ one.unshown|thousands }} more characters are not shown here.</p>
{% endif %}
</article>
{% endmacro %}
{% macro histogram(lengths, longest) %}
<figure>
<svg viewBox="0 0 {{ lengths|length * 20 }} 96" preserveAspectRatio="none" role="img"
 aria-label="Lengths of the examples">
{% for bar in lengths|bars(longest) %}
<rect x="{{ bar.x + 1 }}" y="{{ bar.y }}" width="18" height="{{ bar.height }}"><title>{{ bar.label }}</title></rect>
{% endfor %}
</svg>
<div class="axis"><span>0</span><span>{{ longest|thousands }} tokens</span></div>
<figcaption>Examples by length</figcaption>
</figure>
{% endmacro %}
{% macro legend() %}
<p class="legend"><span>read as context</span><span><mark class="learned">learned</mark></span>
<span><bdi class="control">token</bdi> control token</span>
<span><bdi class="control end">end</bdi> end of a turn, learned</span>
<span><bdi class="control end unread">end</bdi> learned where another token is read</span>
<label for="mono" class="tick mono">fixed width</label><label for="bare" class="tick bare">contents only</label></p>
{% endmacro %}
{% macro not_kept_count(shown, count) %}
Rows not kept whole: {{ count|thousands }}{% if count > shown %} (the first {{ shown|thousands }}){% endif %}
{% endmacro %}
{% macro not_kept(rows) %}
<table class="list">
<tr><th>File</th><th>Row</th><th>Status</th><th>Reason</th></tr>
{% for source, row, status, reason in rows %}
<tr><td>{{ source|harmless }}</td><td>{{ row }}</td><td><span class="badge {{ status }}">{{ status }}</span></td>
<td>{{ reason|harmless }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
"""
