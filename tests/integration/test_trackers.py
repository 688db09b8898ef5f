"""TensorBoard's files hold what was logged."""

import json

import pytest

EACH_THREE = ("--eval_strategy", "steps", "--eval_steps", "3")


def test_tensorboard_has_the_losses_of_the_run(train, conversation_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ("--eval_data_path", str(conversation_file), "--allow_seen_held_out", "True", "--max_steps", "3")
    output = train("tracked", "--deepspeed", "zero2", "--report_to", "tensorboard", *flags, *EACH_THREE)
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    logged = [line["loss"] for line in lines if "loss" in line]
    (folder,) = {path.parent for path in output.rglob("events.out.tfevents.*")}
    read = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(logged, abs=1e-3)
    assert len(read.Scalars("eval/loss")) == 1
