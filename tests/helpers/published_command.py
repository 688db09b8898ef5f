"""The published command and how the launcher is called."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import ROOT

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")


LIMIT_SECONDS = 240


def launch(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [DEEPSPEED, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
