"""Questions of two benchmarks whose published settings ask for examples that no data set sets apart: drawn by a seed.

Called by lm-evaluation-harness through `!function` in the YAML files beside.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

OPTIONS = "ABCD"
EXAMPLES, SEED = 5, 0
FOLDER = "~/.cache/finetune/GAOKAO-Bench"
# Several questions about one text, which stand in one row, begin anew with A.
_OPTION = re.compile(r"(?<![A-Za-z])([A-G])\s*[．.、:：]")


def divided(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    """(examples, asked): five rows drawn by the seed, and the others in their order."""
    chosen = set(random.Random(SEED).sample(range(len(rows)), min(EXAMPLES, len(rows))))
    return [rows[number] for number in sorted(chosen)], [row for number, row in enumerate(rows) if number not in chosen]


def gaokao(file: str, **_: Any) -> dict[str, Any]:
    """The questions of one file of GAOKAO-Bench with four options and one answer, as splits `examples` and `asked`.

    Raises:
        FileNotFoundError: the repository does not lie here.
    """
    import datasets

    path = Path(os.environ.get("GAOKAO_BENCH", FOLDER)).expanduser() / "Data" / "Objective_Questions" / file
    found = json.loads(path.read_text(encoding="utf-8"))["example"]
    rows = [{"question": one["question"].strip(), "answer": one["answer"][0]} for one in found if _has_four(one)]
    examples, asked = divided(rows)
    return {"examples": datasets.Dataset.from_list(examples), "asked": datasets.Dataset.from_list(asked)}


def _has_four(one: dict[str, Any]) -> bool:
    answer = one["answer"]
    return len(answer) == 1 and answer[0] in tuple(OPTIONS) and "".join(_OPTION.findall(one["question"])) == OPTIONS


def four_options(rows: Any) -> list[Any]:
    """AGIEval's questions with four options and one answer."""
    return [row for row in rows if len(row["choices"]) == len(OPTIONS) and len(row["gold"]) == 1]


def agieval_examples(rows: Any) -> list[Any]:
    """Those of a set that stand in front of each question."""
    return divided(four_options(rows))[0]


def agieval_asked(rows: Any) -> list[Any]:
    """Those of a set that are asked."""
    return divided(four_options(rows))[1]
