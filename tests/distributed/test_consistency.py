"""Ranks that differ in data, code, libraries or model all end with one error before the first step."""

import os
import signal

import pytest

from tests.helpers import ranks
from tests.helpers.rows import ROWS, write_rows
from tests.helpers.tiers import mostly_slow


@pytest.fixture
def named(tiny_model, conversation_file, tmp_path):
    flags = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", tmp_path / "output"]
    return [*map(str, flags), "--deepspeed", "zero2", "--num_train_epochs", "1"]


@pytest.mark.parametrize(
    ("what", "status"),
    mostly_slow([("data", 3), ("library", 2), ("code", 2), ("model", 2)], [("data", 3), ("code", 2)]),
)
def test_ranks_that_differ_all_end_with_one_error_before_a_weight_is_loaded(named, tmp_path, what, status):
    other = write_rows(tmp_path / "other.json", ROWS[:-1])

    outcome = ranks.run(tmp_path / "logs", _train_as_another_on_rank_1, (named, what, str(other)))

    assert outcome.statuses[0] == status and outcome.statuses[1] in (status, -signal.SIGTERM), outcome.outputs
    said = "".join(outcome.outputs)
    assert said.count("error") == 1 and "error: " in outcome.outputs[0] and "Traceback" not in said
    words = {"data": "the data differs", "library": "peft differs", "code": "the code of", "model": "the base model"}
    line = next(line for line in said.splitlines() if "error: " in line)
    assert words[what] in line and "rank 0 on " in line and "rank 1 on " in line
    assert not (tmp_path / "output").exists() and "Plan" not in said


def _train_as_another_on_rank_1(argv: list[str], what: str, data: str) -> None:
    from finetune.distributed import host_probe
    from finetune.models import loader
    from finetune.train import main

    if os.environ["RANK"] == "1":
        if what == "data":
            argv = [data if word.endswith("rows.json") else word for word in argv]
        if what == "library":
            plain = host_probe.versions
            host_probe.versions = lambda: {**plain(), "peft": "0.0.1"}
        if what == "code":
            host_probe.code_digest = lambda folder: "0" * 16
        if what == "model":
            loader.model_fingerprint = lambda name, revision=None: "0" * 32
    main(argv)
