"""What a run needs of memory and disk, beside what its hosts have."""

from __future__ import annotations

from typing import Any

from finetune.attention import config_obstacle
from finetune.checking import Setup
from finetune.dataset import PreparedData
from finetune.preflight.findings import Examination
from finetune.preflight.forecast import Batches, foresee
from finetune.preflight.hosts import Answers
from finetune.preflight.planned import PlannedRun
from finetune.preflight.showing import labelled


def examine_resources(
    examination: Examination,
    run: PlannedRun,
    setup: Setup,
    data: PreparedData,
    slots: dict[str, list[int]],
    answers: Answers,
) -> None:
    """Batches and steps, then bytes: of each device, each host's memory, each disk."""
    longest = data.summary.longest
    batches = examination.attempt(
        "configuration",
        lambda: foresee(
            run.arguments, setup, data, selects_logits=True, obstacle=config_obstacle(setup.model.config, longest)
        ),
    )
    if batches is None:
        return
    _note_batches(examination, run, setup, batches)


def _note_batches(examination: Examination, run: PlannedRun, setup: Setup, batches: Batches) -> None:
    facts: dict[str, Any] = batches.facts(run.arguments, setup.world_size)
    configuration = examination.facts["configuration"]
    configuration["batches"] = facts
    lines = {
        "step": f"{facts['arithmetic']}, about {facts['tokens_per_step']:,} tokens",
        "length": f"{facts['steps']:,} steps, {facts['steps_per_epoch']:,} an epoch",
    }
    configuration["lines"] += [*labelled(lines), *(f"note: {note}" for note in batches.form.notes)]
