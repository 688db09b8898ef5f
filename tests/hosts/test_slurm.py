"""The Slurm job of hostfiles/: a hostfile of its nodes, the doctor, the launch, a requeue when it is told to end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.host_runs import LIMIT_SECONDS, cluster, find, left_behind
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.hosts, pytest.mark.faults]


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_job_that_is_told_to_end_saves_on_all_nodes_and_asks_to_be_run_again(nodes, tmp_path, tiny_model):
    """`scontrol` alone is a stand-in: there is no Slurm here."""
    with cluster(nodes, tmp_path, tiny_model) as job:
        (tmp_path / "hostfiles").mkdir()
        (tmp_path / "finetune").symlink_to(ROOT / "finetune")
        (tmp_path / "bin").mkdir()
        program(
            tmp_path / "bin/scontrol",
            f'case "$1" in show) printf "node0\\nnode1\\n";; requeue) echo "$2" > {tmp_path}/requeued;; esac',
        )
        finetune = program(tmp_path / "bin/finetune", f'exec {sys.executable} -m finetune "$@"')
        values = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FINETUNE": finetune, "PYTHONPATH": ROOT,
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[0-1]", "DS_ACCELERATOR": "cpu",
            "PDSH_SSH_ARGS_APPEND": f"-F {nodes[0].folder / 'ssh_config'}",
            "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],
        }  # fmt: skip
        flags = ["--model_name_or_path", tiny_model, "--data_path", job.data, "--output_dir", job.output]
        flags += "--num_train_epochs 2000 --logging_steps 1 --save_strategy no --deepspeed zero2".split()
        typed = ["env", *(f"{name}={value}" for name, value in values.items()), "bash", ROOT / "hostfiles/slurm.sbatch"]
        run = subprocess.Popen(
            nodes[0].command([*typed, *flags], tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        job.started.append(run)
        said = ""
        for line in run.stdout:
            said += line
            if "step 5/" in line:
                break

        script = next(n for n, line in nodes[0].processes().items() if line.startswith("bash ") and "sbatch" in line)
        assert find(nodes[1], "--local_rank=0")
        os.kill(script, signal.SIGTERM)
        said += run.communicate(timeout=LIMIT_SECONDS)[0]

        assert run.returncode == 75, said
        assert (tmp_path / "requeued").read_text() == "4711\n" and not list((tmp_path / "hostfiles").iterdir())
        assert "No errors were found" in said and "stopped by " in said, said
        assert left_behind(nodes) == []
