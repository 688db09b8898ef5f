"""A report as one HTML document that stands alone: style, numbers, plotly.js and a short script of ours inside it.

Its policy lets exactly these two scripts run, by their hashes, and forbids every request. Numbers and names travel as
JSON in an element that is never run; what stands between the elements is escaped as on every page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.report import pages, report_tables, run_outcome
from finetune.report.curves import drawn
from finetune.report.run_reader import RunRecord
from finetune.utils.errors import ConfigError

HERE = Path(__file__).resolve().parent
POLICY = f"{pages.POLICY}; img-src data: blob:; base-uri 'none'; form-action 'none'"
PARTS = ("head", "body")


def render_report(runs: Sequence[RunRecord], *, every: float | None = None, served: bool = False) -> str:
    """The page of one run, or of several over each other.

    Args:
        every: the page looks for news after so many seconds; None: it stays as it is.
        served: by `watching`, so that it may ask there, instead of reloading itself from the disk.

    Raises:
        ConfigError: plotly is not installed.
    """
    scripts = (plotly_script(), _file("page.js"))
    policy = f"{POLICY}; script-src {' '.join(map(_hash, scripts))}" + ("; connect-src 'self'" if served else "")
    return _template("page.html").render(
        title=title(runs),
        parts=render_parts(runs),
        mark=pages.mark(pages.REPORT),
        policy=policy,
        style=pages.STYLE + _file("page.css"),
        numbers=as_script_data(drawn(runs)),
        scripts=scripts,
        every=every,
    )


def render_parts(runs: Sequence[RunRecord]) -> dict[str, str]:
    """What changes while a run goes on, above and below the plots, by name.

    Raises:
        ConfigError: run.json holds something that cannot be shown; no run must fail for that.
    """
    from jinja2 import UndefinedError

    values = context(runs)
    try:
        return {name: _template(f"{name}.html").render(**values) for name in PARTS}
    except (AttributeError, KeyError, TypeError, ValueError, UndefinedError) as error:
        folders = ", ".join(str(run.folder) for run in runs)
        raise ConfigError(f"{folders}: its run.json is not as this version writes it: {error!r}") from error


def context(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What the templates know."""
    return {
        "runs": runs,
        "title": title(runs),
        "facts": report_tables,
        "outcome": run_outcome,
        "made": report_tables.made_at(),
        "answers": report_tables.answers(runs),
        "differing": report_tables.differences(runs) if len(runs) > 1 else [],
    }


def title(runs: Sequence[RunRecord]) -> str:
    """The run's name, or those of all."""
    return runs[0].name if len(runs) == 1 else " \N{MULTIPLICATION SIGN} ".join(run.name for run in runs)


def as_script_data(values: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def plotly_script() -> str:
    """plotly.js, as the Python package brings it, which itself need not be imported.

    Raises:
        ConfigError: it is not installed.
    """
    spec = find_spec("plotly")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / "package_data" / "plotly.min.js" if places else None
    if path is None or not path.is_file():
        raise ConfigError("plotly is not installed, the report draws with it: pip install plotly")
    return path.read_text(encoding="utf-8")


@cache
def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> Any:
    return pages.templates({one: _file(one) for one in ("head.html", "body.html", "page.html")}).get_template(name)


def _hash(script: str) -> str:
    """As a policy names a script: of the text between its tags."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode()}'"
