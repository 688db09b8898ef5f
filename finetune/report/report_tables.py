"""The tables of a report: data, arguments and versions, differences between runs, answers."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import default_of
from finetune.dataset.data_summary import DataSummary
from finetune.report.run_reader import RunRecord

DASH = "\N{EN DASH}"
# (label, where the value lies in run.json)
FINGERPRINTS = (
    ("Run", ("run_id",)),
    ("Data", ("data", "fingerprint")),
    ("Base model", ("model", "name")),
    ("Base revision", ("model", "revision")),
    ("Base files", ("model", "fingerprint")),
    ("Base weights", ("model", "weights")),
    ("Chat format", ("chat", "format")),
    ("Ranks", ("world_size",)),
    ("Precision", ("precision",)),
    ("Attention", ("attention",)),
    ("Batching", ("batching",)),
)
NOT_COMPARED = ("--output_dir", "--run_name", "Run")


def data_summary(run: RunRecord) -> DataSummary | None:
    """Return the counts of the data; None where run.json has none."""
    stored = run.part("data", "summary")
    return DataSummary.of(stored) if stored else None


def model_and_method(run: RunRecord) -> str:
    """`SmolLM2-135M-Instruct, lora`."""
    flags = run.part("arguments")
    name = str(flags.get("model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    method = flags.get("adapter") or ("lora" if flags.get("use_lora") else "all parameters")
    return ", ".join(filter(None, (name, method)))


def arguments(run: RunRecord) -> list[tuple[str, str, bool]]:
    """Return (flag, value, whether it differs from the default), those that differ first."""
    flags = {**run.part("arguments"), **run.part("run_arguments")}
    rows = [(f"--{name}", spelled(value), value != default_of(name)) for name, value in flags.items()]
    return sorted(rows, key=lambda row: not row[2])


def fingerprints(run: RunRecord) -> list[tuple[str, str]]:
    """Return what identifies the run, its data, its base model and the software, as (label, value)."""
    values = {label: run.part(*path[:-1]).get(path[-1]) for label, path in FINGERPRINTS} | run.part("versions")
    return [(label, spelled(value)) for label, value in values.items() if value is not None]


def spelled(value: Any) -> str:
    """Return a value of run.json as it would be typed."""
    if value is None:
        return DASH
    if isinstance(value, list):
        return " ".join(map(spelled, value)) or DASH
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def notes(run: RunRecord) -> list[str]:
    """Return what the run decided by itself, or changed from what was asked."""
    stored = run.facts.get("notes")
    return list(map(spelled, stored)) if isinstance(stored, list) else []


def indented(value: Any) -> str:
    """Return JSON for reading."""
    return json.dumps(value, ensure_ascii=False, indent=2)


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return (name, its value in each run) of every flag, version and fingerprint that differs between the runs."""
    tables = [
        {name: value for name, value, _ in arguments(run) if name not in NOT_COMPARED}
        | {label: value for label, value in fingerprints(run) if label not in NOT_COMPARED}
        for run in runs
    ]
    names = dict.fromkeys(name for table in tables for name in table)
    defaults = {name: spelled(default_of(name[2:])) if name.startswith("--") else DASH for name in names}
    rows = [(name, [table.get(name, default) for table in tables]) for name, default in defaults.items()]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


@dataclass(frozen=True)
class AnswerRow:
    """One answer to a prompt: `kind` is before, after or data; `is_cut`: it does not end by itself."""

    label: str
    kind: str
    text: str
    is_cut: bool = False


@dataclass(frozen=True)
class AnsweredPrompt:
    """The turns (role, text) of a prompt, and the answers to it."""

    turns: tuple[tuple[str, str], ...]
    answers: list[AnswerRow]


def answers(runs: Sequence[RunRecord]) -> list[AnsweredPrompt]:
    """Return each prompt once, with the base's answer, that of each run that has one, and that of the data."""
    by_prompt: dict[tuple[tuple[str, str], ...], list[AnswerRow]] = {}
    for run in runs:
        for answered in run.answers.answered if run.answers else ():
            prompt = answered.prompt
            rows = by_prompt.setdefault(tuple((turn.role, turn.text) for turn in prompt.turns), [])
            if all(row.text != answered.before for row in rows if row.kind == "before"):
                rows.append(AnswerRow("before", "before", answered.before, "before" in answered.cut))
            label = "after" if len(runs) == 1 else run.name
            rows.append(AnswerRow(label, "after", answered.after, "after" in answered.cut))
            if prompt.expected is not None and all(row.kind != "data" for row in rows):
                rows.append(AnswerRow("in the data", "data", prompt.expected))
    order = ("before", "after", "data")
    return [
        AnsweredPrompt(turns, sorted(rows, key=lambda row: order.index(row.kind))) for turns, rows in by_prompt.items()
    ]


def answers_note(runs: Sequence[RunRecord]) -> str:
    """Return how the answers were made, or how to get them."""
    stored = [run.answers for run in runs if run.answers]
    if stored:
        hurried = any(answered.hurried for answers in stored for answered in answers.answered)
        note = f"Greedy decoding, at most {stored[0].new_tokens} tokens each."
        return note + (" Time ran out: some are cut off; finetune report OUTPUT generates them in full." * hurried)
    return f"None were made yet: finetune report {runs[0].folder} makes them."


def quoted(path: Path) -> str:
    """Return a path as it can be typed in a shell."""
    return shlex.quote(str(path))
