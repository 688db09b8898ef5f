"""Self-contained HTML pages: escaping, templates, and the file that holds a page.

The content of the data cannot act on a page: text is escaped, characters without a visible shape are shown by their
code, each turn keeps its own writing direction, and the page's policy forbids requests and all scripts but its own.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune.dataset.data_summary import STATUSES, DataSummary
from finetune.run_dir.data_samples import RowSample, TurnSample
from finetune.run_dir.eval_results import ResultSection
from finetune.run_dir.output_dir_lock import check_writable
from finetune.utils.atomic_io import replacing
from finetune.utils.errors import ConfigError

PREVIEW, REPORT = "finetune preview", "finetune report"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
HEAD_BYTES = 1024  # the generator is named within these
# Without a shape, or changing how others are read: controls, soft hyphen, zero widths, directions, hidden tags.
# The joiner inside an emoji and the tags behind a flag belong to their picture and stay.
SHAPELESS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    "|(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]+"
)
SCRIPTS = (("ja", "[\u3040-\u30ff]"), ("ko", "[\uac00-\ud7af]"), ("zh", "[\u3400-\u9fff]"))
BAR_WIDTH, CHART_HEIGHT = 20, 96
MAX_TEXT = 200_000  # characters of one text; a browser needs a minute for millions
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Preview:
    """A data set and some of its rows, for a page or a terminal."""

    title: str
    facts: Mapping[str, str]  # of the model and how rows are rendered
    summary: DataSummary
    shown: str  # says which rows are shown
    cards: Sequence[RowSample]
    not_kept: Sequence[tuple[str, int, str, str]]  # (source, row, status, reason) of the first rows not kept whole
    statistics: ResultSection | None = None

    def statuses(self) -> list[str]:
        """Return which statuses the rows of the page have."""
        seen = {card.status for card in self.cards} | {status for _, _, status, _ in self.not_kept}
        return [status for status in STATUSES if status in seen]


def render_preview(page: Preview) -> str:
    """Return the page of `finetune preview`."""
    return render_page("preview.html", page=page, title=page.title, generator=PREVIEW, style=asset("base.css"))


def render_page(template: str, *, scripts: Sequence[str] = (), policy: str = "", **values: Any) -> str:
    """Render a whole page. Its policy lets `scripts` and the one that translates labels run, by their hashes."""
    scripts = (asset("labels.js"), *scripts)
    policy = f"{POLICY}; script-src {' '.join(map(_hash, scripts))}{policy}"
    return render(template, scripts=scripts, policy=policy, **values)


def _hash(script: str) -> str:
    """Name a script as a policy does, by the text between its tags."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode()}'"


# ---- templates


@cache
def asset(name: str) -> str:
    """Return the text of a template, style sheet or script beside this module."""
    return (FOLDER / name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Render a template of this folder; `frame.html` is around each page, `rows.html` has macros for rows."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Any:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(FOLDER),
    )
    environment.filters.update(
        visible=visible_text, between=_between, language=language, bars=bars, thousands="{:,}".format
    )
    return environment


def name_of(character: str) -> str:
    """Return what is shown for a character that has no shape, such as U+001B."""
    return f"U+{ord(character):04X}"


def visible_text(text: str) -> Any:
    """Return escaped text with shapeless characters named; only this and `_between` make markup."""
    text = str(text)
    if len(text) > MAX_TEXT:
        text = f"{text[:MAX_TEXT]} ... ({len(text) - MAX_TEXT:,} more characters)"

    def named(match: re.Match[str]) -> str:
        return "".join(f'<i class="odd">{name_of(character)}</i>' for character in match.group())

    return Markup(SHAPELESS.sub(named, str(escape(text))))


def _between(text: str) -> Any:
    """The same for what a template writes between turns, on one line: line feeds are marked."""
    return Markup(str(visible_text(text)).replace("\n", '<span class="lf">\n</span>'))


def language(text: TurnSample | str) -> str:
    """Return the language that lets the browser pick the right glyphs; empty where the script does not decide."""
    characters = text if isinstance(text, str) else "".join(segment.text for segment in text.pieces)
    return next((code for code, script in SCRIPTS if re.search(script, characters)), "")


def bars(counts: Sequence[int], longest: int) -> list[dict[str, Any]]:
    """Return counts in equal bins from 0 to `longest` tokens as the bars of a drawing."""
    highest, bins = max(counts, default=0), len(counts)
    drawn = []
    for number, count in enumerate(counts):
        first = -(-number * (longest + 1) // bins)
        last = max(first, -(-(number + 1) * (longest + 1) // bins) - 1)
        height = max(2.0, CHART_HEIGHT * count / highest) if count else 0.0
        label = f"{first:,} to {last:,} tokens: {count:,} examples"
        drawn.append({"x": number * BAR_WIDTH, "y": CHART_HEIGHT - height, "height": round(height, 2), "label": label})
    return drawn


# ---- files


def check_replaceable(path: Path, generator: str = PREVIEW) -> None:
    """Refuse to overwrite a file that `generator` did not write, and a folder that cannot be written to."""
    check_writable(path.parent, f"--html {path}")
    try:
        with open(path, "rb") as file:
            is_ours = f'content="{generator}"'.encode() in file.read(HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be replaced: {error.strerror}") from None
    if not is_ours:
        raise ConfigError(f"--html {path}: was not made by {generator} and is not replaced: name another file")


def write_page(path: Path, html: str, generator: str = PREVIEW) -> None:
    """Write a page atomically; missing parent folders are created."""
    check_replaceable(path, generator)
    with replacing(path, f"--html {path}") as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(html, encoding="utf-8", errors="backslashreplace", newline="\n")
