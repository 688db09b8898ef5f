"""The C++ operators that DeepSpeed compiles: which ones a run needs, and building them ahead of it."""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.distributed.compat import patch_build_lock
from finetune.utils.errors import lines_of

MAX_ERROR_CHARACTERS = 400


def build_notes(folder: Path, *, use_cpu: bool) -> list[str]:
    """Return a line if DeepSpeed has yet to compile its CPU communication operator: that takes a silent minute."""
    if not use_cpu or any(folder.glob("**/deepspeed_shm_comm.so")):
        return []
    return [f"DeepSpeed compiles its communication operator first, once, into {folder}: about a minute"]


def operators_of(config: Mapping[str, Any] | None, *, use_cpu: bool) -> list[str]:
    """Return DeepSpeed's names of the operators that a run with this config compiles; none without DeepSpeed."""
    if config is None:
        return []
    zero = config.get("zero_optimization", {})
    optimizer_device, parameter_device = (
        (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")
    )
    names = ["deepspeed_shm_comm"] if use_cpu else []
    optimizer = config.get("optimizer")
    if optimizer is not None and not optimizer.get("params", {}).get("torch_adam", False):
        names.append("cpu_adam" if optimizer_device != "none" else "fused_adam")
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
        names.append("quantizer")
    return names + (["async_io"] if "nvme" in (optimizer_device, parameter_device) else [])


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
