"""RANK, WORLD_SIZE and the rest for processes that srun, mpirun or nothing has started, instead of `deepspeed`.

`deepspeed --launcher openmpi|slurm|mpich` leaves that to mpi4py in the middle of a run. Read from the variables that
these programs set, the rank is known from the first line on, and a job of eight ranks is never eight jobs of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from finetune.distributed import host_probe
from finetune.utils.errors import ConfigError

DEFAULT_PORT = "29500"


@dataclass(frozen=True)
class ProcessStarter:
    """A program that starts ranks, and the names of the variables that it sets."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


STARTERS = (
    # https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html
    ProcessStarter("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                   "OMPI_COMM_WORLD_LOCAL_SIZE"),
    # https://www.mpich.org: Hydra's process manager
    ProcessStarter("mpirun (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # https://slurm.schedmd.com/srun.html: variables of a step, which a batch script itself does not have
    ProcessStarter("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)  # fmt: skip


def init_rank_env(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if RANK is not set.

    A process that nothing has started becomes rank 0 of 1.
    """
    if "RANK" in environment:
        return
    for starter in STARTERS:
        if {starter.rank, starter.world_size, starter.local_rank} <= environment.keys():
            environment.update(_variables_from(starter, environment))
            return
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(host_probe.free_port()))


def _variables_from(starter: ProcessStarter, environment: Mapping[str, str]) -> dict[str, str]:
    world_size = int(environment[starter.world_size])
    # Slurm writes 4(x2),3 for two hosts of four tasks and one of three.
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get(starter.local_world_size, "1"))
    local_world_size = max(map(int, counts))
    variables = {
        "RANK": environment[starter.rank], "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": environment[starter.local_rank], "LOCAL_WORLD_SIZE": str(min(local_world_size, world_size)),
        "MASTER_PORT": environment.get("MASTER_PORT", DEFAULT_PORT),
    }  # fmt: skip
    if "MASTER_ADDR" not in environment:
        first = first_host(environment.get("SLURM_STEP_NODELIST", "")) if starter.name == "srun" else None
        if first is None and local_world_size < world_size:
            raise ConfigError(
                f"{starter.name} has started rank {variables['RANK']} of {world_size} on several hosts, and nothing "
                "says where their rendezvous is: set MASTER_ADDR to the first host's name, as in "
                '`deepspeed --launcher openmpi --launcher_args "-x MASTER_ADDR=node0" ...`'
            )
        variables["MASTER_ADDR"] = first or "127.0.0.1"
    return variables


def first_host(nodes: str) -> str | None:
    """The first name of a Slurm node list: `node[007-009,12],gpu1` -> `node007`; None for an empty list."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else None
