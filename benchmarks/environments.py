"""Where contenders run: environments of their own, made when they are missing, and the machine in words."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENVS = HERE / ".venvs"
PRETRAINED = ROOT / ".models" / "SmolLM2-135M-Instruct"
TORCH = "torch==2.13.0"
SECONDS_FOR_AN_INSTALLATION = 3_600
LLAMA_FACTORY = (("llamafactory==0.9.5", "transformers==5.6.0"), ("torchvision", "torchaudio"))
TRL = (("trl==1.16.0", "transformers==5.23.0", "tokenizers==0.23.3", "peft==0.21.2"), ())
MS_SWIFT = (("ms-swift==4.6.0", "transformers==5.19.0"), ())


@dataclass(frozen=True)
class Contender:
    """Something to measure: `requirements` make its environment, without any it runs in the caller's.

    `without` are packages that pip installs along with it and that do not load beside a CPU build of torch.
    """

    name: str
    label: str
    driver: str
    requirements: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


class Unavailable(Exception):
    """A contender that cannot be measured here; the others can."""


def pythons_of(chosen: Sequence[Contender], venvs: Path) -> dict[str, Path]:
    """The interpreter of every contender that can be had here; a line for each that cannot."""
    pythons: dict[str, Path] = {}
    for contender in chosen:
        try:
            pythons[contender.name] = _python(contender, venvs) if contender.requirements else Path(sys.executable)
        except Unavailable as reason:
            print(f"{contender.label} is left out: {reason}")
    return pythons


def _python(contender: Contender, venvs: Path) -> Path:
    """The interpreter of a toolkit's own environment, made when it is missing or holds other versions."""
    folder = venvs / contender.driver.removeprefix("train_").removesuffix(".py")  # drivers of one toolkit share it
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join([TORCH, *contender.requirements])
    if ready.is_file() and ready.read_text() == wanted:
        return python
    print(f"installing {contender.label} into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (venvs / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check"]
    _installed([sys.executable, "-m", "venv", str(folder)])
    _installed([*pip, "install", *quiet, TORCH])
    _installed([*pip, "install", *quiet, TORCH, *contender.requirements])
    if contender.without:
        _installed([*pip, "uninstall", *quiet, "--yes", *contender.without])
    ready.write_text(wanted)
    return python


def _installed(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_AN_INSTALLATION)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"its installation took more than {SECONDS_FOR_AN_INSTALLATION:,} s") from None
    if done.returncode:
        raise Unavailable(f"it could not be installed (no network?): {last_line(done.stderr)}")


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def machine() -> str:
    """Processor, usable cores, memory and Python, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {size:.0f} GiB, Python {platform.python_version()}"
