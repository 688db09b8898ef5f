"""What a run was made of, in words: its data, every argument and version, what differs between runs, its answers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.config import default_of
from finetune.dataset.data_summary import DataSummary
from finetune.report.run_reader import RunRecord

DASH = "\N{EN DASH}"
Rows = list[tuple[str, str]]


# ---- the data


def data_summary(run: RunRecord) -> DataSummary | None:
    """Counts of the data, as the run found them; None where run.json has none."""
    found = run.part("data", "summary")
    return DataSummary.of(found) if found else None


# ---- every argument


def model_and_method(run: RunRecord) -> str:
    """`SmolLM2-135M-Instruct, lora`."""
    flags = run.part("arguments")
    name = str(flags.get("model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    kind = flags.get("adapter") or ("lora" if flags.get("use_lora") else "all parameters")
    return ", ".join(filter(None, (name, kind)))


def arguments(run: RunRecord) -> list[tuple[str, str, bool]]:
    """(flag, value, whether it is another than the default), what was chosen first."""
    flags = {**run.part("arguments"), **run.part("run_arguments")}
    found = [(f"--{name}", spelled(value), value != default_of(name)) for name, value in flags.items()]
    return sorted(found, key=lambda one: not one[2])


def fingerprints(run: RunRecord) -> Rows:
    """What identifies the run, its data, its base, and the software."""
    base, data = run.part("model"), run.part("data")
    found = {
        "Run": run.facts.get("run_id"),
        "Data": data.get("fingerprint"),
        "Base model": base.get("name"),
        "Base revision": base.get("revision"),
        "Base files": base.get("fingerprint"),
        "Base weights": base.get("weights"),
        "Chat format": run.part("chat").get("format"),
        "Ranks": run.facts.get("world_size"),
        "Precision": run.facts.get("precision"),
        "Attention": run.facts.get("attention"),
        "Batching": run.facts.get("batching"),
    }
    versions = {name: value for name, value in run.part("versions").items()}
    return [(label, spelled(value)) for label, value in {**found, **versions}.items() if value is not None]


def spelled(value: Any) -> str:
    """A value of run.json as it would be typed."""
    if value is None:
        return DASH
    if isinstance(value, list):
        return " ".join(map(spelled, value)) or DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def notes(run: RunRecord) -> list[str]:
    """What the run decided by itself, or differently from what was asked."""
    found = run.facts.get("notes")
    return list(map(spelled, found)) if isinstance(found, list) else []


def indented(value: Any) -> str:
    """JSON to be read."""
    return json.dumps(value, ensure_ascii=False, indent=2)


# ---- several runs


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(name, its value in each run) of every flag, version and fingerprint that is not alike in all runs."""
    tables = [
        {
            **{name: value for name, value, _ in arguments(run) if name not in ("--output_dir", "--run_name")},
            **{label: value for label, value in fingerprints(run) if label != "Run"},
        }
        for run in runs
    ]
    names = dict.fromkeys(name for table in tables for name in table)
    found = [(name, [table.get(name, _default(name)) for table in tables]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def _default(name: str) -> str:
    return spelled(default_of(name[2:])) if name.startswith("--") else DASH


# ---- answers


@dataclass(frozen=True)
class AnswerRow:
    """One column of a prompt's answers: `kind` is before, after or data."""

    label: str
    kind: str
    text: str


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt, by its turns, and what was answered to it."""

    turns: tuple[tuple[str, str], ...]
    answers: list[AnswerRow]


def answers(runs: Sequence[RunRecord]) -> list[AnsweredPrompt]:
    """Each prompt once, with the base's answer, that of each run that has one, and what the data says."""
    found: dict[tuple[tuple[str, str], ...], list[AnswerRow]] = {}
    for run in runs:
        for one in run.answers.answered if run.answers else ():
            asked = found.setdefault(tuple((turn.role, turn.text) for turn in one.prompt.turns), [])
            if one.before not in [answer.text for answer in asked if answer.kind == "before"]:
                asked.insert(0, AnswerRow("before", "before", one.before))
            asked.append(AnswerRow("after" if len(runs) == 1 else run.name, "after", one.after))
            if one.prompt.expected is not None and not any(answer.kind == "data" for answer in asked):
                asked.append(AnswerRow("in the data", "data", one.prompt.expected))
    order = ("before", "after", "data")
    return [AnsweredPrompt(turns, sorted(each, key=lambda one: order.index(one.kind))) for turns, each in found.items()]


def answers_note(runs: Sequence[RunRecord]) -> str:
    """How the answers were made, or how to get them."""
    made = [run.answers for run in runs if run.answers]
    if made:
        hurried = any(one.hurried for each in made for one in each.answered)
        note = f"Greedy, at most {made[0].new_tokens} tokens each."
        return note + (" Time was short: some end early; finetune report OUTPUT makes them whole." * hurried)
    if runs[0].state == "complete":
        return f"None were made yet: finetune report {runs[0].folder} makes them."
    return "There is no result yet that could answer."


def quoted(path: Path) -> str:
    """A path as it can be typed in a shell."""
    return shlex.quote(str(path))


def made_at() -> str:
    """Now, for the foot of a page."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
