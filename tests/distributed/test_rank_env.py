"""Two processes that srun starts are one run of two ranks."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ranks
from tests.helpers.paths import ROOT
from tests.helpers.short_runs import SHORT


@pytest.mark.slow
def test_two_processes_of_srun_are_one_run_of_two_ranks(tiny_model, conversation_file, tmp_path):
    output = tmp_path / "output"
    named = ["--model_name_or_path", tiny_model, "--data_path", conversation_file, "--output_dir", output, *SHORT]
    command = [sys.executable, ROOT / "finetune/finetune.py", *named, "--deepspeed", "zero2", "--max_steps", "2"]
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    common = {**os.environ, **step, "MASTER_PORT": str(ranks.free_port()), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            list(map(str, command)),
            env={**common, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip

    said = [one.communicate(timeout=ranks.LIMIT_SECONDS)[0] for one in started]

    assert [one.returncode for one in started] == [0, 0], said
    ran = json.loads((output / "run.json").read_text())
    assert (ran["world_size"], ran["completed"], ran["result"]["steps"]) == (2, True, 2)
