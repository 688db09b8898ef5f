"""Process-wide settings: rank variables, paths, malloc, garbage collection; before torch, and before the steps."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path

from finetune.distributed import rank_env

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def prepare_environment() -> None:
    """Make the settings that torch must find when it is imported; what the user has set is never changed.

    * Rank variables are set from those of srun or mpirun; a process that nothing has started becomes rank 0 of 1.
    * Large blocks are allocated outside the heap (`allocate_outside_heap`).
    * Garbage is not collected while libraries are loaded, which saves a fifth of that time (`enable_gc`).
    * Compiled DeepSpeed operators live beside the interpreter that built them (environments that share the default
      folder rebuild each other's operators), and `ninja` of this environment is found without activating it.
    """
    gc.disable()
    allocate_outside_heap()
    rank_env.init_rank_env(os.environ)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


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
