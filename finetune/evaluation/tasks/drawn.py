"""Draw few-shot examples, with a fixed seed, for two benchmarks whose data sets have no split for examples.

lm-evaluation-harness calls these functions through `!function` in the YAML files of this folder.
"""

import json
import os
import random
import re
from pathlib import Path
from typing import Any

OPTIONS = "ABCD"
NUM_EXAMPLES, SEED = 5, 0
FOLDER = "~/.cache/finetune/GAOKAO-Bench"
# A row may hold several questions about one text; each begins again with A.
_OPTION = re.compile(r"(?<![A-Za-z])([A-G])\s*[．.、:：]")


def split_examples(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    """Split rows into five random examples and the questions to ask, both in their order."""
    drawn = set(random.Random(SEED).sample(range(len(rows)), min(NUM_EXAMPLES, len(rows))))
    return [rows[index] for index in sorted(drawn)], [row for index, row in enumerate(rows) if index not in drawn]


def gaokao(file: str, **_: Any) -> dict[str, Any]:
    """Load the questions of a GAOKAO-Bench file with four options and one answer; splits `examples` and `asked`."""
    import datasets

    path = Path(os.environ.get("GAOKAO_BENCH", FOLDER)).expanduser() / "Data" / "Objective_Questions" / file
    entries = json.loads(path.read_text(encoding="utf-8"))["example"]
    rows = [
        {"question": entry["question"].strip(), "answer": entry["answer"][0]}
        for entry in entries
        if _has_four_options(entry)
    ]
    examples, asked = split_examples(rows)
    return {"examples": datasets.Dataset.from_list(examples), "asked": datasets.Dataset.from_list(asked)}


def _has_four_options(entry: dict[str, Any]) -> bool:
    answer, options = entry["answer"], "".join(_OPTION.findall(entry["question"]))
    return len(answer) == 1 and answer[0] in tuple(OPTIONS) and options == OPTIONS


def four_options(rows: Any) -> list[Any]:
    """Return the AGIEval questions with four options and one answer."""
    return [row for row in rows if len(row["choices"]) == len(OPTIONS) and len(row["gold"]) == 1]


def agieval_examples(rows: Any) -> list[Any]:
    """Return the few-shot examples of a set."""
    return split_examples(four_options(rows))[0]


def agieval_asked(rows: Any) -> list[Any]:
    """Return the questions of a set that are asked."""
    return split_examples(four_options(rows))[1]
