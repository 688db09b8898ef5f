"""The environment of all tests: no GPU, no hub, operators compiled once, prepared data in a folder that is removed.

Import this before torch. Ranks inherit the environment.
"""

import os
import sys
import tempfile
import zlib
from pathlib import Path

OUTER_ENVIRONMENT = dict(os.environ)  # for the tests marked `gpu`

# A build records its include paths: checkouts that share one environment through a link have one build each.
_LINKED = f"-{zlib.crc32(sys.prefix.encode()):x}" if Path(sys.prefix).is_symlink() else ""
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / f"torch_extensions{_LINKED}"))
# One `ninja` for all processes: two versions build anew what the other one built.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the import of bitsandbytes takes two seconds more, for a compiler
os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # else scikit-learn, under some methods of peft, starts a process to count cores
if not Path(os.environ.get("XDG_CACHE_HOME", "")).name.startswith("finetune-tests-"):
    _CACHE = tempfile.TemporaryDirectory(prefix="finetune-tests-")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
