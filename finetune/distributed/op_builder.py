"""Operators that DeepSpeed compiles: one process of a host builds, the others wait, and none waits for a dead one.

torch guards a folder of extensions by the mere existence of a file `lock` (torch/utils/file_baton.py): a process that
is killed while it builds, or while it looks whether there is something to build, leaves the file behind, and every
later run waits for it for ever, silently. Here a lock of the operating system, which ends with its process, says who
builds; torch's file is still written, for tools that know nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.2


def patch_build_lock() -> None:
    """From now on torch asks our lock first; what it finds left behind it removes, and logs that."""
    from filelock import FileLock, Timeout
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    class Baton(FileBaton):
        """torch's, behind a lock that dies with its process."""

        def try_acquire(self) -> bool:
            """Whether this process is the one to build."""
            self.held = FileLock(f"{self.lock_file_path}.held")
            try:
                self.held.acquire(timeout=0)
            except Timeout:
                return False
            lock = Path(self.lock_file_path)
            while lock.exists() and is_file_open(lock):  # another tool builds here
                time.sleep(SECONDS_BETWEEN_LOOKS)
            if lock.exists():
                line = f"{lock} was left behind by a build that was interrupted: removed"
                logger.warning(line, extra={"all_ranks": True})
                lock.unlink(missing_ok=True)
            return bool(super().try_acquire())

        def wait(self) -> None:
            """Until the process that builds is done, or dead."""
            with self.held:
                pass

        def release(self) -> None:
            """Let the others go on."""
            super().release()
            self.held.release()

    cpp_extension.FileBaton = Baton


def build_notes(folder: Path, *, use_cpu: bool) -> list[str]:
    """A line where DeepSpeed will compile its CPU communication operator first: that takes a silent minute."""
    if not use_cpu or any(folder.glob("**/deepspeed_shm_comm.so")):
        return []
    return [f"DeepSpeed compiles its communication operator first, once, into {folder}: about a minute"]


def is_file_open(path: Path) -> bool:
    """Whether a process of this host has the file open, as torch does while it builds."""
    wanted = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == wanted:
                return True
        except OSError:  # the process or descriptor is gone, or belongs to another user
            continue
    return False


def operators_of(config: Mapping[str, Any] | None, *, use_cpu: bool) -> list[str]:
    """DeepSpeed's names of the operators that a run with this config compiles; none without DeepSpeed."""
    if config is None:
        return []
    zero = config.get("zero_optimization", {})
    devices = {(zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    found = ["deepspeed_shm_comm"] if use_cpu else []
    optimizer = config.get("optimizer")
    if optimizer is not None and not optimizer.get("params", {}).get("torch_adam", False):
        on_host = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
        found.append("cpu_adam" if on_host else "fused_adam")
    return found + (["async_io"] if "nvme" in devices else [])


def build_operators() -> None:
    """Read names as JSON from stdin, build each, print name -> the compiler's error or null, as one line of JSON.

    For a process of its own on the host in question: what DeepSpeed later says of a failed build is that an object has
    no `ds_opt_adam`.
    """
    names = json.loads(sys.stdin.read())
    with contextlib.redirect_stdout(sys.stderr):
        patch_build_lock()
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        found = {name: _build(ALL_OPS[name]) if name in ALL_OPS else "DeepSpeed does not know it" for name in names}
    print(json.dumps(found))


def _build(builder: Any) -> str | None:
    try:
        builder.load(verbose=False)
    except Exception as error:  # a compiler, a linker, a missing header: all say so in words
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        telling = [line for line in lines if "error" in line.lower() and not line.startswith("Error building")]
        return (telling or lines)[0][:400]
    return None
