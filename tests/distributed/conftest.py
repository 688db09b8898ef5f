"""Runs of several ranks that differ in nothing but how a step is made up."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import ranks
from tests.helpers.batch_runs import ROWS, SGD
from tests.helpers.rows import write_rows


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.json", ROWS)


@pytest.fixture
def train_shaped(tmp_path, tiny_model, rows_file):
    """Train on rows of different lengths under SGD; metrics and weights."""

    def run(name: str, world_size: int, *flags: str, rows: Path = rows_file) -> tuple[list[dict], dict]:
        output = tmp_path / name
        argv = ["--model_name_or_path", tiny_model, "--data_path", rows, "--output_dir", output, *SGD, *flags]
        outcome = ranks.train(tmp_path / f"{name}-logs", argv, world_size)
        assert outcome.succeeded, "\n".join(outcome.outputs)
        weights = next(output.glob("*model.safetensors"))
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], load_file(weights)

    return run
