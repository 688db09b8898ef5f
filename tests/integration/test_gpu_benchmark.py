"""The measurement of a GPU, at toy sizes on a CPU: both tables, with the stock Trainer beside this project."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def test_the_tables_are_filled(tmp_path):
    tables = tmp_path / "gpu.md"
    only = ["--only", "attention", "loss", "alone", "stock", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", *only, "--markdown", tables],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = tables.read_text().splitlines()
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines) if cells}
    assert {"attention, 4 x 16", "head and loss, 32 x 1000"} < rows.keys()
    assert all(float(rows[run][2].replace(",", "")) > 0 for run in ("alone", "stock")), done.stdout
    assert float(rows["alone"][6]) > 0  # the forecast of the doctor
