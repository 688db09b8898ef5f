"""The C++ operators that DeepSpeed compiles: which are not built yet, and building them ahead of a run."""

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.distributed.compat import patch_build_lock
from finetune.utils.errors import lines_of
from finetune.utils.options import source_folder

MAX_ERROR_CHARACTERS = 400


def build_notes(folder: Path, names: Iterable[str]) -> list[str]:
    """Return a line on the operators that DeepSpeed has yet to compile: each takes a silent minute or more."""
    prebuilt = source_folder("deepspeed") / "ops"
    missing = [
        name for name in names if not any(folder.glob(f"**/{name}.so")) and not any(prebuilt.glob(f"**/{name}_op*.so"))
    ]
    if not missing:
        return []
    return [f"DeepSpeed compiles {', '.join(missing)} first, once, into {folder}: about a minute each"]


def build_operators() -> None:
    """Build the operators whose names stand as JSON on stdin; print name -> the compiler's error or null, as JSON.

    This runs in a process of its own on the host in question. DeepSpeed itself only says later, about a failed build,
    that an object has no `ds_opt_adam`.
    """
    names = json.loads(sys.stdin.read())
    with contextlib.redirect_stdout(sys.stderr):
        patch_build_lock()
        from deepspeed.ops.op_builder.all_ops import ALL_OPS

        errors = {name: _build(ALL_OPS[name]) if name in ALL_OPS else "DeepSpeed does not know it" for name in names}
    print(json.dumps(errors))


def _build(builder: Any) -> str | None:
    try:
        builder.load(verbose=False)
    except Exception as error:  # a compiler, a linker, a missing header: all raise with a text
        lines = lines_of(str(error), repr(error))
        from torch.utils.cpp_extension import CUDA_HOME
        from torch.version import cuda

        if cuda is not None and CUDA_HOME is None:
            return f"nvcc is missing: install the CUDA toolkit {cuda}, that of torch, or set CUDA_HOME to its folder"
        telling = [line for line in lines if "error" in line.lower() and not line.startswith("Error building")]
        return (telling or lines)[0][:MAX_ERROR_CHARACTERS]
    return None
