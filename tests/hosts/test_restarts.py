"""`finetune train --max_restarts`: hosts that die are replaced, and the result is that of the uninterrupted run."""

import json

import pytest

from tests.helpers import runs
from tests.helpers.host_runs import cluster, until
from tests.helpers.short_runs import LORA

pytestmark = [pytest.mark.hosts, pytest.mark.faults]

FLAGS = (
    "--max_steps 60 --logging_steps 1 --save_strategy steps --save_steps 5 --per_device_train_batch_size 1 "
    "--deepspeed zero2 --write_report False"
).split()


def test_a_spare_then_the_first_host_again_take_over_from_hosts_that_die_and_the_weights_are_the_same(
    three_nodes, tmp_path, tiny_model
):
    first, second, third = three_nodes
    with cluster(three_nodes, tmp_path, tiny_model) as job:
        job.write_hostfile("node0 slots=1", "node1 slots=1", "node2 slots=1 spare")
        job.completed(job.start(*FLAGS, *LORA, "--output_dir", tmp_path / "whole"), output=tmp_path / "whole")

        run = job.start(*FLAGS, *LORA, launcher=("--max_restarts", "2"))
        said = until(run, "step 7/")
        with second.off():
            said += until(run, "step 27/")
        with third.off():  # and the second is up again
            said += job.ended(run, within=200, without=[third])
    assert run.returncode == 0, said
    assert "without node1, with the spare node2" in said and "without node2, with the spare node1" in said
    assert runs.result_of(job.output) == runs.result_of(tmp_path / "whole")
    starts = json.loads((job.output / "run.json").read_text())["starts"]
    assert [start["how"].partition(":")[0] for start in starts] == ["failed", "failed", "complete"]
    assert all(start["restarted_after"] and start["seconds_lost"] > 0 for start in starts[1:])
