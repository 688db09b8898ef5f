"""TensorBoard's files hold what was logged."""

from __future__ import annotations

import json

import pytest


def test_tensorboard_has_the_losses_of_the_run(train, conversation_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--eval_data_path", str(conversation_file), "--max_steps", "3", "--eval_strategy", "steps")
    output = train("tracked", "--deepspeed", "zero2", "--report_to", "tensorboard", *flags, "--eval_steps", "3")
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    logged = [line["loss"] for line in lines if "loss" in line]
    (folder,) = {path.parent for path in output.rglob("events.out.tfevents.*")}
    read = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(logged, abs=1e-3)
    assert len(read.Scalars("eval/loss")) == 1
