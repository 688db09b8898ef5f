"""The ranges of pyproject.toml at both ends: a telling part of the tests with the oldest versions and with the newest.

    python tests/oldest_and_newest.py [oldest] [newest]

Each end gets a new environment (about 1.5 GB, removed afterwards) under `$TMPDIR`; torch is in both the one that
requirements.txt pins. The last result is in docs/installation.md. Ends with status 1 where an end does not install or
a test fails.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENDS = ("oldest", "newest")
# Where the versions of libraries show: a run of two ranks, losses and gradients, data on disk, a merged model.
TESTS = (
    "tests/distributed/test_published_command.py::test_the_published_command_runs_verbatim_on_two_ranks",
    "tests/unit/config/test_deepspeed_config.py",
    "tests/unit/config/test_deepspeed_zero.py",
    "tests/unit/models/test_loss.py",
    "tests/unit/dataset/test_prepare.py",
    "tests/integration/test_merge.py",
)
TOLD = ("transformers", "deepspeed", "accelerate", "peft", "datasets", "tokenizers", "numpy", "pyarrow")


def required() -> list[str]:
    """What an installation requires, as pyproject.toml says it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def at_end(requirement: str, end: str, torch: str) -> str:
    """`a>=1,<2` -> `a==1` at the oldest end; as it is at the newest, where pip takes the newest."""
    if requirement.startswith("torch>="):
        return torch
    return re.sub(r">=([^,]+).*", r"==\1", requirement) if end == "oldest" else requirement


def tried(end: str, folder: Path) -> tuple[dict[str, str], str, bool]:
    """Install and test one end: versions of the libraries, what pytest (or pip) said last, whether all is well."""
    (torch,) = re.findall(r"^torch==.*", (ROOT / "requirements.txt").read_text(), re.M)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = [str(folder / "bin" / "python"), "-m"]
    wanted = [*(at_end(one, end, torch) for one in required()), "setuptools", "pytest>=8", "hypothesis>=6.100"]
    install = [*python, "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *wanted]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        return {}, installed.stderr.strip().splitlines()[-1], False
    listed = subprocess.run([*python, "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    versions = dict(line.split("==") for line in listed.splitlines() if "==" in line)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = [*python, "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *TESTS]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as testing:
        for line in testing.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return versions, last, testing.returncode == 0


def main(ends: list[str]) -> int:
    """Try the ends, one after the other, and print a table."""
    if set(ends) - set(ENDS):
        print(__doc__, file=sys.stderr)
        return 2
    rows = {}
    for end in ends or ENDS:
        with tempfile.TemporaryDirectory(prefix=f"finetune-{end}-") as folder:
            rows[end] = tried(end, Path(folder) / "venv")
    print(f"{date.today()}, Python {sys.version.split()[0]}")
    for end, (versions, said, _) in rows.items():
        told = ", ".join(f"{name} {versions[name]}" for name in TOLD if name in versions)
        print(f"| {end} | {told} | {said} |")
    return int(not all(well for *_, well in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
