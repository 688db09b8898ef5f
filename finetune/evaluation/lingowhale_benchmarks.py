"""The eight benchmarks of the table published with LingoWhale-8B, as tasks of lm-evaluation-harness.

Source of the table and its settings: README_EN.md of https://github.com/DeepLangAI/LingoWhale-8B at commit
121939d1660b50b02947e0baffe32c7d982bbf02. It does not state prompts, seeds and means. A departure says where a setting
is not available or had to be chosen; departures are printed with the scores.

`lingowhale_benchmarks.json` has the settings and the published scores, in percent; * marks scores that the table takes
from the publications of those models.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUITE = "lingowhale"
SOURCE = "LingoWhale-8B's README, commit 121939d"


@dataclass(frozen=True)
class Benchmark:
    """One column of the table."""

    name: str
    shots: int
    task: str  # name in lm-eval, or in `tasks/` beside this file
    metric: str  # as lm-eval names it: metric,filter
    needs: tuple[str, ...]  # data sets on the hub, or other data
    departures: tuple[str, ...]  # differences from the settings of the table
    runs_code: bool = False


_TABLES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
BENCHMARKS = tuple(
    Benchmark(**{**column, "needs": tuple(column["needs"]), "departures": tuple(column["departures"])})
    for column in _TABLES["benchmarks"]
)
_NAMES = [benchmark.name for benchmark in BENCHMARKS]
PUBLISHED = {
    "source": SOURCE,
    "names": _NAMES,
    "rows": {model: dict(zip(_NAMES, scores, strict=True)) for model, scores in _TABLES["published"].items()},
}


def how_to_get(needed: str) -> str:
    """Say how to download the data, and where to put it."""
    if needed == "GAOKAO-Bench":
        return (
            "GAOKAO-Bench: git clone https://github.com/OpenLMLab/GAOKAO-Bench ~/.cache/finetune/GAOKAO-Bench, or set "
            "GAOKAO_BENCH to another folder"
        )
    return (
        f"{needed} from the Hugging Face hub: run the same command once with network access, and copy "
        "~/.cache/huggingface to this machine (or set HF_HOME to it)"
    )
