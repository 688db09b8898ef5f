"""A process knows its rank whatever has started it, and a job of several ranks is never several jobs of one."""

import pytest

from finetune.distributed.process_setup import first_host, init_rank_env
from finetune.utils.errors import ConfigError

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4,3",
         "SLURM_STEP_NODELIST": "node[07-08]"}  # fmt: skip


def placed(**variables: str) -> dict[str, str]:
    init_rank_env(variables)
    return {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}


def test_what_deepspeed_or_torchrun_has_said_stays():
    said = {"RANK": "3", "WORLD_SIZE": "4", **OPEN_MPI}
    variables = dict(said)
    init_rank_env(variables)
    assert variables == said


@pytest.mark.parametrize("said", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": ""}, {"RANK": "0", "WORLD_SIZE": "-1"},
                                  {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0.5"}])  # fmt: skip
def test_what_is_no_number_of_a_launcher_is_named(said):
    with pytest.raises(ConfigError, match="(RANK=x?|WORLD_SIZE=(-1)?|LOCAL_RANK=0.5): expected a number"):
        init_rank_env(said)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("0", "1", "0", "1", "127.0.0.1")),
        ({**OPEN_MPI, "MASTER_ADDR": "node0"}, ("5", "8", "1", "4", "node0")),
        (MPICH, ("1", "2", "1", "2", "127.0.0.1")),
        (SLURM, ("6", "7", "2", "4", "node07")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, ("0", "1", "0", "1", "127.0.0.1")),
    ],
    ids=["nothing", "openmpi", "mpich", "srun", "a batch script itself"],
)
def test_the_rank_is_read_from_what_started_it(variables, expected):
    assert tuple(placed(**variables).values()) == expected


def test_ranks_of_several_hosts_that_could_not_meet_do_not_start():
    with pytest.raises(ConfigError, match="rank 5 of 8 on several hosts.*MASTER_ADDR"):
        placed(**OPEN_MPI)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[007-009,12],gpu1", "node007"), ("a,b", "a"), ("gpu-[1,3]", "gpu-1"), ("n1", "n1"), ("", None)],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first
