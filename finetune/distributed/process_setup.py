"""Process-wide settings: rank variables, paths, malloc, garbage collection; before torch, and before the steps.

`deepspeed --launcher openmpi|slurm|mpich` leaves RANK, WORLD_SIZE and the rest to mpi4py in the middle of a run. Read
from the variables that srun and mpirun set, the rank is known from the first line on, and a job of eight ranks is never
eight jobs of one.
"""

import contextlib
import gc
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from finetune.distributed import host_probe
from finetune.utils.errors import ConfigError
from finetune.utils.proc import cache_folder

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
DEFAULT_PORT = "29500"


def prepare_environment() -> None:
    """Make the settings that torch must find when it is imported; what the user has set is never changed.

    Garbage is not collected while libraries are loaded, which saves a fifth of that time. Compiled DeepSpeed operators
    live in a folder of this environment (those that share the default folder rebuild each other's operators), and
    `ninja` of this environment is found without activating it. Batches have unequal lengths: torch's allocator on a GPU
    grows segments instead of adding others. The ranks of a host share its cores, on which an offloaded optimizer
    computes.
    """
    gc.disable()
    force_data_only()
    allocate_outside_heap()
    init_rank_env(os.environ)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(operator_folder(Path(sys.prefix))))
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its old name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if local_ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // local_ranks)))


def operator_folder(prefix: Path) -> Path:
    """Return where operators are compiled: in the Python environment, or in the user's cache if that is another's."""
    folder = prefix / "torch_extensions"
    if os.access(folder if folder.is_dir() else prefix, os.W_OK):
        return folder
    return cache_folder(f"torch_extensions-{zlib.crc32(bytes(prefix)):08x}")


@contextlib.contextmanager
def restore_settings() -> Iterator[None]:
    """Give a process that goes on after the training its environment and its garbage collection back."""
    before, collected = dict(os.environ), gc.isenabled()
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        if collected:
            gc.enable()


def force_data_only() -> None:
    """Let no `torch.load` of this process or of its children run code from a file, whatever a library asks for."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def enable_gc() -> None:
    """Collect garbage again, except among the objects loaded so far, which stay and need not be searched."""
    gc.freeze()
    gc.enable()


def allocate_outside_heap() -> None:
    """Allocate blocks of 1 MiB and more outside glibc's heap, so that they return to the system once freed.

    Loading, moving and flattening a model leave freed copies of it behind. In the heap their pages would stay resident
    to the end of the run, fragmented by the small blocks of the steps. With another libc, or if the user has tuned
    malloc, nothing happens.
    """
    _tune_malloc({M_MMAP_THRESHOLD: 1 << 20})


def keep_freed_blocks() -> None:
    """Keep freed blocks of up to 32 MiB for reuse during the steps, and return what the heap holds unused now.

    This is what glibc arrives at by itself; asking the system for each block would slow the steps by a tenth or more.
    """
    _tune_malloc({M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20})


def _tune_malloc(settings: dict[int, int]) -> None:
    import ctypes

    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL(None)
        for name, value in settings.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)


# Programs that start ranks, and their variables: rank, world size, local rank and local world size.
STARTERS = {
    # https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                          "OMPI_COMM_WORLD_LOCAL_SIZE"),
    # https://www.mpich.org: Hydra's process manager
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # https://slurm.schedmd.com/srun.html: variables of a step, which a batch script itself does not have
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}  # fmt: skip


def init_rank_env(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if RANK is not set.

    A process that nothing has started becomes rank 0 of 1.

    Raises:
        ConfigError: a variable that a launcher sets is no number, or one of them is missing.
    """
    if "RANK" in environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            value = environment.get(name, "" if name == "WORLD_SIZE" else "0")
            if not value.isdecimal():
                raise ConfigError(f"{name}={value}: expected a number, as a launcher sets it: unset it, and RANK")
        return
    for starter, names in STARTERS.items():
        if environment.keys() >= set(names[:3]):
            environment.update(_variables_from(starter, names, environment))
            return
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", str(host_probe.free_port()))


def _variables_from(starter: str, names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    rank, world_size, local_rank = (environment[name] for name in names[:3])
    # Slurm writes 4(x2),3 for two hosts of four tasks and one of three.
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get(names[3], "1"))
    local_world_size = max(map(int, counts))
    variables = {
        "RANK": rank, "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": str(min(local_world_size, int(world_size))),
        "MASTER_PORT": environment.get("MASTER_PORT", DEFAULT_PORT),
    }  # fmt: skip
    if "MASTER_ADDR" not in environment:
        first = first_host(environment.get("SLURM_STEP_NODELIST", "")) if starter == "srun" else None
        if first is None and local_world_size < int(world_size):
            raise ConfigError(
                f"{starter} has started rank {rank} of {world_size} on several hosts, and nothing "
                "says where their rendezvous is: set MASTER_ADDR to the first host's name, as in "
                '`deepspeed --launcher openmpi --launcher_args "-x MASTER_ADDR=node0" ...`'
            )
        variables["MASTER_ADDR"] = first or "127.0.0.1"
    return variables


def first_host(nodes: str) -> str | None:
    """The first name of a Slurm node list: `node[007-009,12],gpu1` -> `node007`; None for an empty list."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else None
