"""Which rank this process is, where something else than `deepspeed` or torchrun has started it: srun, mpirun, nothing.

`deepspeed --launcher openmpi|slurm|mpich` leaves that to mpi4py, in the midst of a run. Read from the variables that
these programs set, it is known from the first line on, and a job of eight ranks is never eight jobs of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from finetune.distributed import host_probe
from finetune.utils.errors import ConfigError

DEFAULT_PORT = "29500"


@dataclass(frozen=True)
class Starter:
    """A program that starts ranks, and its variables: the rank, how many, which of this host's, how many there."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


STARTERS = (
    # https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html
    Starter("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE"),
    # https://www.mpich.org: Hydra's process manager
    Starter("mpirun (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # https://slurm.schedmd.com/srun.html: those of a step, which a batch script itself has not
    Starter("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)  # fmt: skip


def init_rank_env(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where they are not set.

    A process that nothing has started becomes rank 0 of 1.

    Raises:
        ConfigError: one of several hosts, and nothing says where the ranks are to meet.
    """
    if "RANK" in environment:
        return
    for starter in STARTERS:
        if {starter.rank, starter.size, starter.local_rank} <= environment.keys():
            environment.update(_placed(starter, environment))
            return
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(host_probe.free_port()))


def _placed(starter: Starter, environment: Mapping[str, str]) -> dict[str, str]:
    size = int(environment[starter.size])
    # Slurm writes 4(x2),3 for two hosts of four and one of three.
    local_size = max(int(one) for one in re.findall(r"(\d+)(?:\(x\d+\))?", environment.get(starter.local_size, "1")))
    placed = {
        "RANK": environment[starter.rank], "WORLD_SIZE": str(size), "LOCAL_RANK": environment[starter.local_rank],
        "LOCAL_WORLD_SIZE": str(min(local_size, size)),
    }  # fmt: skip
    if "MASTER_ADDR" not in environment:
        first = first_host(environment.get("SLURM_STEP_NODELIST", "")) if starter.name == "srun" else None
        if first is None and local_size < size:
            raise ConfigError(
                f"{starter.name} has started rank {placed['RANK']} of {size} on several hosts, and nothing says where "
                "they meet: give MASTER_ADDR, the first host's name, as in "
                '`deepspeed --launcher openmpi --launcher_args "-x MASTER_ADDR=node0" ...`'
            )
        placed["MASTER_ADDR"] = first or "127.0.0.1"
    if "MASTER_PORT" not in environment:
        placed["MASTER_PORT"] = DEFAULT_PORT
    return placed


def first_host(nodes: str) -> str | None:
    """The first name of a Slurm list: `node[007-009,12],gpu1` -> `node007`; None for an empty one."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else None
