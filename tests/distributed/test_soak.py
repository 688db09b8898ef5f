"""Random faults for some minutes, see benchmarks/soak.py; `--soak_minutes 20` is what a release gets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.faults
def test_nothing_is_lost_under_random_faults(request, tiny_model):
    minutes = request.config.getoption("--soak_minutes")
    words = [ROOT / "benchmarks/soak.py", "--model", tiny_model, "--minutes", minutes, "--seed", "0"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " faults, 0 violations" in done.stdout, done.stdout + done.stderr
