"""HTML pages that stand alone: no script, no network, light and dark; made of plain values.

What stands in the data cannot act on the page: everything is escaped, characters without a shape of their own are
named, each turn keeps its own direction, and the page's policy forbids scripts and requests altogether.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from finetune.errors import ConfigError, StorageError

GENERATOR = "finetune preview"
MARK = f'<meta name="generator" content="{GENERATOR}">'
BYTES_UP_TO_THE_MARK = 1024
# Without a shape, or changing how others are read: controls, soft hyphen, zero widths, directions, hidden tags.
# The joiner inside an emoji and the tags behind a flag belong to their picture and stay.
SHAPELESS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    "|(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]+"
)
SCRIPTS = (("ja", "[\u3040-\u30ff]"), ("ko", "[\uac00-\ud7af]"), ("zh", "[\u3400-\u9fff]"))
BAR_WIDTH, CHART_HEIGHT = 20, 96


class Piece(Protocol):
    """A run of text: `kind` is context, learned, control or learned_control; `read` whether the model sees it."""

    kind: str
    text: str
    read: bool


@dataclass(frozen=True)
class Turn:
    """One turn of an example, or what a template writes between two (`role` is None there)."""

    role: str | None
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class Card:
    """One row: `status` is kept, cut, split or dropped; an example is a list of turns, none where it was dropped."""

    source: str
    row: int
    id: str | None
    status: str
    tokens: int
    learned: int
    reason: str | None
    examples: Sequence[Sequence[Turn]]


@dataclass(frozen=True)
class Page:
    """A data set and some of its rows.

    `facts` are (label, value) pairs, `lengths` counts examples in equal bins from 0 to `longest` tokens, `not_kept`
    are (source, row, status, reason) of the first of `num_not_kept` rows that were not kept whole.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    lengths: Sequence[int]
    longest: int
    shown: str
    cards: Sequence[Card]
    not_kept: Sequence[tuple[str, int, str, str]]
    num_not_kept: int


def render_page(page: Page) -> str:
    """The page as one self-contained HTML document."""
    return _templates().from_string(PAGE).render(page=page, bars=_bars(page.lengths, page.longest), mark=MARK)


def name_of(character: str) -> str:
    """What to show for a character that has no shape.

    >>> name_of("\\x1b")
    'U+001B'
    """
    return f"U+{ord(character):04X}"


def check_replaceable(path: Path) -> None:
    """Refuse a file that a page must not be written over.

    Raises:
        ConfigError: it exists and was not made by `finetune preview`, or is not a file.
    """
    try:
        with open(path, "rb") as file:
            ours = MARK.encode() in file.read(BYTES_UP_TO_THE_MARK)
    except (FileNotFoundError, NotADirectoryError):  # nothing to replace; `write_page` says what hinders it
        return
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be replaced: {error.strerror}") from None
    if not ours:
        raise ConfigError(f"--html {path}: was not made by {GENERATOR} and is not replaced: name another file")


def write_page(path: Path, html: str) -> None:
    """Write the page whole or not at all; folders above it are made.

    Raises:
        ConfigError: as `check_replaceable`.
        StorageError: it cannot be written.
    """
    check_replaceable(path)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(html, encoding="utf-8", errors="backslashreplace", newline="\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"--html {path}: cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class _Bar:
    x: int
    y: float
    height: float
    label: str


def _bars(counts: Sequence[int], longest: int) -> list[_Bar]:
    highest = max(counts, default=0)
    bars = []
    for number, count in enumerate(counts):
        first = -(-number * (longest + 1) // len(counts))
        last = -(-(number + 1) * (longest + 1) // len(counts)) - 1
        height = max(2.0, CHART_HEIGHT * count / highest) if count else 0.0
        label = f"{first:,} to {max(first, last):,} tokens: {count:,} examples"
        bars.append(_Bar(number * BAR_WIDTH, CHART_HEIGHT - height, round(height, 2), label))
    return bars


@cache
def _templates() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(harmless=_harmless, between=_between, language=_language, thousands="{:,}".format)
    return environment


def _harmless(text: str) -> Any:
    """Escaped text with shapeless characters named; `_between` and this are the only makers of markup."""
    from markupsafe import Markup, escape

    def named(match: re.Match[str]) -> str:
        return "".join(f'<i class="odd">{name_of(one)}</i>' for one in match.group())

    return Markup(SHAPELESS.sub(named, str(escape(text))))


def _between(text: str) -> Any:
    """The same for what a template writes between turns, on one line: line feeds are marked."""
    from markupsafe import Markup

    return Markup(str(_harmless(text)).replace("\n", '<span class="lf">\n</span>'))


def _language(turn: Turn) -> str:
    """What to tell the browser, so that it picks the right shapes; empty where the script does not decide."""
    text = "".join(piece.text for piece in turn.pieces)
    return next((code for code, script in SCRIPTS if re.search(script, text)), "")


STYLE = """
:root { color-scheme: light dark; --paper: #f5f6f8; --card: #fff; --ink: #1c2128; --soft: #59636e; --line: #dde1e6;
  --learned: #d5f2de; --learned-ink: #0c4a24; --learned-line: #2c9156; --pill: #ebe7fb; --pill-ink: #4a2f9a;
  --end: #1f7a45; --end-ink: #fff; --human: #2f5fb3; --model: #1f7a45; --system: #8a5a00;
  --cut: #fff0cf; --cut-ink: #6b4700; --split: #dbeafe; --split-ink: #1b4a91; --dropped: #fde1de;
  --dropped-ink: #8f1d14; --kept: #e6e9ed; --kept-ink: #3d454e; --bar: #5b8def; --odd: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1216; --card: #171b21; --ink: #e4e8ee; --soft: #9aa5b1;
  --line: #2b323b; --learned: #123a25; --learned-ink: #c3f3d4; --learned-line: #3fb46f; --pill: #2c2549;
  --pill-ink: #cfc3ff; --end: #3fb46f; --end-ink: #04160b; --human: #8db4ff; --model: #63d290; --system: #e9b857;
  --cut: #47350b; --cut-ink: #ffdf9a; --split: #17335d; --split-ink: #bcd8ff; --dropped: #521b17;
  --dropped-ink: #ffc9c3; --kept: #2b323b; --kept-ink: #ccd3db; --bar: #6f9dff; --odd: #ff9d94; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.65 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial, "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC", "Source Han Sans SC", "Noto Color Emoji", sans-serif; }
.page { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.3; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h1 small { display: block; font-size: .82rem; font-weight: 600; letter-spacing: .08em; text-transform: uppercase;
  color: var(--soft); }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
.overview { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.5rem 2.5rem;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.25rem 1.5rem; }
dl { display: grid; align-content: start; grid-template-columns: max-content minmax(0, 1fr); margin: 0;
  gap: .3rem 1.25rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0; align-self: end; } figcaption, .axis { font-size: .8rem; color: var(--soft); }
figure svg { display: block; width: 100%; height: 6.5rem; border-bottom: 1px solid var(--line); }
figure rect { fill: var(--bar); } .axis { display: flex; justify-content: space-between; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: baseline; margin: 1.25rem 0 0;
  font-size: .88rem; color: var(--soft); }
.legend label { cursor: pointer; border: 1px solid var(--line); border-radius: 99px; padding: .05rem .75rem;
  background: var(--card); color: var(--ink); } .legend .tick.mono { margin-left: auto; }
.choice { position: fixed; top: 0; opacity: 0; pointer-events: none; }
.tick::before { content: "\\2610\\00a0"; } #mono:checked ~ .page .tick.mono::before,
#bare:checked ~ .page .tick.bare::before { content: "\\2611\\00a0"; }
#mono:focus-visible ~ .page .tick.mono, #bare:focus-visible ~ .page .tick.bare { outline: 2px solid var(--bar); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin: 0 0 1.1rem; }
.card > header { display: flex; flex-wrap: wrap; gap: .25rem .9rem; align-items: baseline; padding: .7rem 1.25rem;
  border-bottom: 1px solid var(--line); font-size: .88rem; color: var(--soft); overflow-wrap: anywhere; }
.card > header:last-child { border-bottom: 0; }
h3 { margin: 0; font-size: 1rem; color: var(--ink); }
.badge { border-radius: 99px; padding: .05rem .65rem; font-size: .8rem; font-weight: 600; }
.badge.kept { background: var(--kept); color: var(--kept-ink); }
.badge.cut { background: var(--cut); color: var(--cut-ink); }
.badge.split { background: var(--split); color: var(--split-ink); }
.badge.dropped { background: var(--dropped); color: var(--dropped-ink); }
.numbers { margin-left: auto; font-variant-numeric: tabular-nums; }
.reason { flex-basis: 100%; color: var(--ink); }
.example { padding: .6rem 1.25rem 1rem; } .example + .example { border-top: 1px dashed var(--line); }
.part { margin: .2rem 0 .4rem; font-size: .8rem; font-weight: 600; color: var(--soft); }
.turn { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr); gap: .9rem; margin: .3rem 0; }
.role { font-size: .8rem; font-weight: 700; padding-top: .2rem; text-align: right; }
.human .role { color: var(--human); } .model .role { color: var(--model); } .system .role { color: var(--system); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; tab-size: 4;
  border-left: 3px solid var(--line); padding-left: .9rem; }
.human .text { border-color: var(--human); } .system .text { border-color: var(--system); }
.model .text { border-color: var(--model); }
.between { margin: .3rem 0 .3rem 6rem; font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; }
.lf::before { content: "\\21b5"; }
.learned { background: var(--learned); color: var(--learned-ink); box-shadow: inset 0 -1px var(--learned-line);
  padding: .14em 0; border-radius: 2px; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.control { font: .78em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--pill); color: var(--pill-ink); border-radius: 5px; padding: .1em .42em; margin: 0 .12em;
  white-space: pre-wrap; unicode-bidi: isolate; }
.control.end { background: var(--end); color: var(--end-ink); }
.control.unread { background: none; color: var(--model); box-shadow: inset 0 0 0 1.5px var(--end); }
.odd { font: normal .75em ui-monospace, Menlo, Consolas, monospace; color: var(--odd); border: 1px dotted currentColor;
  border-radius: 3px; padding: 0 .2em; unicode-bidi: isolate; direction: ltr; white-space: nowrap; }
.list { border-collapse: collapse; width: 100%; font-size: .88rem; background: var(--card); }
.list td, .list th { text-align: left; vertical-align: top; padding: .35rem .8rem; border: 1px solid var(--line);
  overflow-wrap: anywhere; } .list th { color: var(--soft); font-weight: 600; }
#mono:checked ~ .page .text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  "Noto Sans Mono CJK SC", monospace; font-size: .86rem; }
#bare:checked ~ .page .between { display: none; }
@media (max-width: 640px) { .page { padding: 1.25rem .75rem 3rem; } .overview { grid-template-columns: minmax(0, 1fr);
  padding: 1rem; } .card > header, .example { padding-left: .9rem; padding-right: .9rem; } .numbers { margin-left: 0; }
  .turn { grid-template-columns: minmax(0, 1fr); gap: .05rem; } .role { text-align: left; padding-top: 0; }
  .between { margin-left: .95rem; } h1 { font-size: 1.3rem; } }
@media print { .card { break-inside: avoid; } body { background: none; } }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{{ mark|safe }}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ page.title|harmless }}</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<input type="checkbox" id="mono" class="choice"><input type="checkbox" id="bare" class="choice">
<div class="page">
{% macro piece(one, newlines) %}
{%- if one.kind in ("control", "learned_control") -%}
<bdi class="control{{ ' end' if one.kind == 'learned_control' }}{{ ' unread' if not one.read }}" dir="ltr"
{%- if not one.read %} title="learned here, not read"{% endif %}>{{ one.text|harmless }}</bdi>
{%- elif one.kind == "learned" -%}
<mark class="learned">{{ one.text|harmless }}</mark>
{%- else -%}
<span>{{ one.text|between if newlines else one.text|harmless }}</span>
{%- endif -%}
{% endmacro %}
<h1><small>Conversations as the model reads them</small>{{ page.title|harmless }}</h1>
<section class="overview" aria-label="Summary">
<dl>
{% for label, value in page.facts %}
<dt>{{ label }}</dt><dd>{{ value|harmless }}</dd>
{% endfor %}
</dl>
{% if page.longest %}
<figure>
<svg viewBox="0 0 {{ bars|length * 20 }} 96" preserveAspectRatio="none" role="img" aria-label="Lengths of the examples">
{% for bar in bars %}
<rect x="{{ bar.x + 1 }}" y="{{ bar.y }}" width="18" height="{{ bar.height }}"><title>{{ bar.label }}</title></rect>
{% endfor %}
</svg>
<div class="axis"><span>0</span><span>{{ page.longest|thousands }} tokens</span></div>
<figcaption>Examples by length</figcaption>
</figure>
{% endif %}
</section>
<p class="legend"><span>read as context</span><span><mark class="learned">learned</mark></span>
<span><bdi class="control">token</bdi> control token</span>
<span><bdi class="control end">end</bdi> end of a turn, learned</span>
<span><bdi class="control end unread">end</bdi> learned where another token is read</span>
<label for="mono" class="tick mono">fixed width</label><label for="bare" class="tick bare">contents only</label></p>
<h2>{{ page.shown }}</h2>
<main>
{% for card in page.cards %}
<article class="card {{ card.status }}" id="row-{{ loop.index0 }}">
<header>
<h3>Row {{ card.row }}</h3>
<span class="badge {{ card.status }}">{{ card.status }}</span>
<span>{{ card.source|harmless }}{% if card.id is not none %}, id {{ card.id|harmless }}{% endif %}</span>
<span class="numbers">{{ card.tokens|thousands }} tokens, {{ card.learned|thousands }} learned
{%- if card.tokens %} ({{ "%.1f"|format(100 * card.learned / card.tokens) }}%){% endif %}</span>
{% if card.reason %}
<span class="reason">{{ card.reason|harmless }}</span>
{% endif %}
</header>
{% for example in card.examples %}
<section class="example">
{% if card.examples|length > 1 %}
<p class="part">Window {{ loop.index }} of {{ card.examples|length }}</p>
{% endif %}
{% for turn in example %}
{% if turn.role is none %}
<div class="between" dir="ltr">{% for one in turn.pieces %}{{ piece(one, true) }}{% endfor %}</div>
{% else %}
<div class="turn {{ turn.role }}"><div class="role">{{ turn.role }}</div>
<div class="text" dir="auto" lang="{{ turn|language }}">
{%- for one in turn.pieces %}{{ piece(one, false) }}{% endfor -%}
</div></div>
{% endif %}
{% endfor %}
</section>
{% endfor %}
</article>
{% endfor %}
</main>
{% if page.not_kept %}
<h2>Rows not kept whole: {{ page.num_not_kept|thousands }}
{%- if page.num_not_kept > page.not_kept|length %} (the first {{ page.not_kept|length }}){% endif %}</h2>
<table class="list">
<tr><th>File</th><th>Row</th><th>Status</th><th>Reason</th></tr>
{% for source, row, status, reason in page.not_kept %}
<tr><td>{{ source|harmless }}</td><td>{{ row }}</td><td><span class="badge {{ status }}">{{ status }}</span></td>
<td>{{ reason|harmless }}</td></tr>
{% endfor %}
</table>
{% endif %}
</div>
</body>
</html>
"""
)
