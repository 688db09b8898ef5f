"""The environment of all tests: no GPU, no hub, operators compiled once, prepared data in a folder that is removed.

Import this before torch. Ranks inherit the environment.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

OUTER_ENVIRONMENT = dict(os.environ)  # for the tests marked `gpu`

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path(os.environ.get("XDG_CACHE_HOME", "")).name.startswith("finetune-tests-"):
    _CACHE = tempfile.TemporaryDirectory(prefix="finetune-tests-")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
