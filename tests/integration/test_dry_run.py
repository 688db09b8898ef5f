"""A dry run fails where the run would."""

import pytest

from finetune.preflight import dry_run
from finetune.utils.errors import FinetuneError


def test_a_run_that_fails_is_named_with_what_it_said(tmp_path):
    with pytest.raises(FinetuneError, match="two steps.*status 3: error: row 7"):
        command = ["sh", "-c", "echo error: row 7 >&2; exit 3"]
        dry_run.run_dry_run(command, tmp_path, tmp_path / "output", trusts_code=False)


def test_another_second_step_after_going_on_is_a_failure(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    metrics = output / "metrics.jsonl"
    command = f"touch {metrics}; echo '{{\"loss\": '$(wc -l < {metrics})'}}' >> {metrics}"  # 0, then 1
    with pytest.raises(FinetuneError, match="the second step has loss"):
        dry_run.run_dry_run(["sh", "-c", command], tmp_path, output, trusts_code=False)
