"""What is set for a whole process: its rank, its paths, its heap, its garbage; before torch, and before the steps."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path

from finetune.distributed import rank_env

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


def prepare_environment() -> None:
    """Process-wide settings that must stand before torch is imported; what the user has set is never changed.

    * a process that srun or mpirun has started knows which rank it is; one that nothing has becomes rank 0 of 1;
    * blocks that loading needs lie apart from the heap (`load_outside_the_heap`);
    * garbage is not collected while libraries are loaded, which takes a fifth of that time (`enable_gc`);
    * compiled DeepSpeed operators live beside the interpreter that built them (environments that share the default
      folder rebuild each other's work), and `ninja` of this environment is found without activating it.
    """
    gc.disable()
    load_outside_the_heap()
    rank_env.init_rank_env(os.environ)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def enable_gc() -> None:
    """Collect garbage again, but not among what was loaded so far: it stays, and need not be searched."""
    gc.freeze()
    gc.enable()


def load_outside_the_heap() -> None:
    """From now on blocks of 1 MiB and more lie apart from glibc's heap, and go back to the system once freed.

    Loading, moving and flattening a model leave copies of it behind. In the heap their room would stay resident to the
    end of the run, and be taken up by the small blocks of the steps here and there. With another libc, or where the
    user has tuned malloc, nothing happens.
    """
    _tune_malloc({M_MMAP_THRESHOLD: 1 << 20})


def keep_freed_blocks() -> None:
    """The opposite, for the steps: blocks up to 32 MiB are kept and used again, which glibc comes to by itself; asking
    the system for each would cost the steps a tenth of their speed and more. What the heap holds unused goes back."""
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
