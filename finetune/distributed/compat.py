"""Changes to other libraries' internals that distributed runs need.

`FileBaton`: torch (2.13; torch/utils/file_baton.py) takes the mere existence of a file `lock` for a running build. A
process that is killed while it builds a C++ extension leaves the file behind, and every later run waits for it
forever. A lock of the operating system, which ends with its process, now decides who builds; torch's file is still
written, for tools that know only that.

`deepspeed_shm_comm`: DeepSpeed (0.19.8; ops/csrc/cpu/comm/shm.cpp) writes a buffer for each CPU rank to /dev/shm,
crashes where there is no space for it, and never removes it.
"""

import logging
import os
import shutil
import time
from pathlib import Path

from finetune.utils.errors import StorageError
from finetune.utils.proc import POLL_SECONDS

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
SHARED_BUFFER_BYTES = 69_206_024  # of `struct allreduce_workspace`


def check_shared_memory() -> None:
    """Check that DeepSpeed's buffers for the CPU ranks of this host fit into /dev/shm.

    Raises:
        StorageError: they do not.
    """
    ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    needed, free = SHARED_BUFFER_BYTES * ranks, shutil.disk_usage(SHARED_MEMORY).free
    if free < needed and ranks == int(os.environ.get("WORLD_SIZE", "1")):  # on several hosts they use the network
        error = StorageError(
            f"out of shared memory: {free / 1e6:,.0f} MB are free in {SHARED_MEMORY}, {ranks} ranks need "
            f"{needed / 1e6:,.0f} MB: give a container --shm-size=1g, or remove what ended programs have left there "
            f"(`ls -l {SHARED_MEMORY}`)"
        )
        error.is_shared = True  # no rank has written its buffer yet
        raise error


def remove_shared_buffer() -> None:
    """Remove this rank's buffer from /dev/shm, once all ranks have opened it; it exists as long as they run."""
    variables = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *variables])
    (SHARED_MEMORY / name).unlink(missing_ok=True)


def patch_build_lock() -> None:
    """Guard torch's build lock with a lock of the operating system; remove what a killed build has left, and log it."""
    from filelock import FileLock, Timeout
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    class SelfReleasingBaton(FileBaton):
        """torch's lock behind one that ends with its process."""

        def try_acquire(self) -> bool:
            """Return whether this process is the one that builds."""
            self.process_lock = FileLock(f"{self.lock_file_path}.held")
            try:
                self.process_lock.acquire(timeout=0)
            except Timeout:
                return False
            lock_file = Path(self.lock_file_path)
            while lock_file.exists() and is_file_open(lock_file):  # another tool builds here
                time.sleep(POLL_SECONDS)
            if lock_file.exists():
                line = f"{lock_file} was left behind by an interrupted build: removed"
                logger.warning(line, extra={"all_ranks": True})
                lock_file.unlink(missing_ok=True)
            return bool(super().try_acquire())

        def wait(self) -> None:
            """Wait until the process that builds is done or dead."""
            with self.process_lock:
                pass

        def release(self) -> None:
            """Let the other processes continue."""
            super().release()
            self.process_lock.release()

    cpp_extension.FileBaton = SelfReleasingBaton  # type: ignore[misc]


def is_file_open(path: Path) -> bool:
    """Return whether a process of this host has the file open, as torch has while it builds."""
    wanted = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == wanted:
                return True
        except OSError:  # the process or descriptor is gone, or belongs to another user
            continue
    return False
