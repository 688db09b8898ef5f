"""Random faults, see benchmarks/soak.py: twenty minutes in the slow tier, 2.5 for each seed."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

MINUTES = 2.5


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_under_random_faults(seed, tiny_model):
    words = [ROOT / "benchmarks/soak.py", "--model", tiny_model, "--minutes", MINUTES, "--seed", seed]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " faults, 0 violations" in done.stdout, done.stdout + done.stderr
