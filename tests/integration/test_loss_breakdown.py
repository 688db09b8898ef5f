"""Losses by source and answer of real runs."""

import json
from pathlib import Path

import pytest

from tests.helpers.rows import ROWS, write_rows


@pytest.fixture
def two_sources(tmp_path) -> tuple[Path, Path]:
    several = [[("system", "Be brief."), ("human", "a"), ("model", "bb"), ("human", "c"), ("model", "ddd")]]
    long = [[turn for number in range(20) for turn in (("human", f"{number}"), ("model", f"x{number}"))]]
    return write_rows(tmp_path / "one.json", ROWS[:3]), write_rows(tmp_path / "two.json", several + long)


def test_a_run_writes_them_and_their_means_are_the_loss(train, two_sources):
    one = train("one", "--deepspeed", "zero2", "--data_path", *map(str, two_sources), world_size=1)
    two = train("two", "--deepspeed", "zero3", "--data_path", *map(str, two_sources), "--batching", "padded")
    read = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
    assert len(read[0]) > 4
    for line in read[0]:  # one conversation a step
        (source,) = line["loss_by_source"].values()
        assert source == pytest.approx(line["loss"], abs=1e-4)
    assert {name for line in read[1] for name in line["loss_by_source"]} == {str(path) for path in two_sources}
    assert {"1", "2"} <= {name for line in read[1] for name in line.get("loss_by_turn", {})}


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_parts(train, two_sources):
    saving = ("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "0", "--max_steps", "4")
    flags = ("--deepspeed", "zero2", "--data_path", *map(str, two_sources), "--logging_steps", "2", *saving)
    whole = train("whole", *flags)
    last = (whole / "metrics.jsonl").read_text().splitlines()[-1]
    train("whole", *flags, "--resume_from_checkpoint", str(whole / "checkpoint-3"))
    again = (whole / "metrics.jsonl").read_text().splitlines()[-1]
    names = ("step", "loss", "loss_by_source", "loss_by_turn")
    assert [json.loads(again)[name] for name in names] == [json.loads(last)[name] for name in names]
