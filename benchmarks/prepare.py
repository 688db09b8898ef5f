"""How fast conversations are prepared for training: the bare tokenizer, this project, and three other toolkits.

    python benchmarks/prepare.py                                          everything, 2,000 conversations
    python benchmarks/prepare.py --only bare finetune --rows 20000        no other toolkit
    python benchmarks/prepare.py --only finetune --rows 1000000 --repeats 1

Every measurement is a process of its own with a fresh cache; the contenders take turns, so what else the machine does
hits all alike, and the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conversations import as_messages, conversations, write_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENVS = HERE / ".venvs"
TOKENIZER = ROOT / ".models" / "SmolLM2-135M-Instruct"
TORCH = "torch==2.13.0"
SECONDS_FOR_AN_INSTALLATION = 3_600
SECONDS_FOR_A_RUN = 3_600
# One thread in each process, so that processes are what is compared.
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


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


CONTENDERS = (
    Contender("bare", "bare tokenizer", "bare_tokenizer.py"),
    Contender("finetune", "this project", "this_project.py"),
    Contender(
        "llamafactory",
        "LLaMA-Factory 0.9.5",
        "llama_factory.py",
        ("llamafactory==0.9.5", "transformers==5.6.0"),
        ("torchvision", "torchaudio"),
    ),
    Contender("trl", "TRL 1.16.0", "trl_sft.py", ("trl==1.16.0", "transformers==5.23.0", "tokenizers==0.23.3")),
    Contender("swift", "ms-swift 4.6.0", "ms_swift.py", ("ms-swift==4.6.0", "transformers==5.19.0")),
)


@dataclass
class Measured:
    """One contender with one number of processes: all its runs, the best of which counts."""

    name: str
    label: str
    processes: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any]:
        """The run that took the fewest seconds."""
        return min(self.runs, key=lambda run: run["seconds"])

    @property
    def rate(self) -> float:
        """Conversations per second."""
        return self.best["rows"] / self.best["seconds"]

    @property
    def cpu_rate(self) -> float:
        """Conversations per second of CPU time, of all its processes together."""
        return self.best["rows"] / min(run["cpu_seconds"] for run in self.runs)


class Unavailable(Exception):
    """A contender that cannot be measured here; the others can."""


def main() -> None:
    given = _arguments()
    chosen = [contender for contender in CONTENDERS if contender.name in given.only]
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=given.work) as folder:
        data, messages = Path(folder) / "data.json", Path(folder) / "messages.json"
        write_rows(data, conversations(given.rows))
        if set(given.only) != {"finetune"}:
            write_rows(messages, map(as_messages, conversations(given.rows)))
        print(f"{given.rows:,} conversations, {data.stat().st_size / 1e6:,.1f} MB; {_machine()}")
        pythons = _pythons(chosen, given.venvs)
        chosen = [contender for contender in chosen if contender.name in pythons]
        began, load = time.strftime("%Y-%m-%d %H:%M"), os.getloadavg()[0]
        results = _measure(chosen, pythons, given, Path(folder))
        facts = {"machine": _machine(), "began": began, "load_at_begin": load, "load_at_end": os.getloadavg()[0]}
        facts["data"] = {"rows": given.rows, "bytes": data.stat().st_size}
    if not results:
        sys.exit("nothing could be measured")
    _print_table(results)
    print("cores taken: by other work while the best run was measured; scaling is low where they were missing")
    print(f"load average {load:.1f} at the beginning, {facts['load_at_end']:.1f} at the end")
    if given.json:
        facts["results"] = [{**asdict(one), "rate": one.rate, "cpu_rate": one.cpu_rate} for one in results]
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(
        description="How fast conversations are prepared for training, against the bare tokenizer and other toolkits."
    )
    parser.add_argument("--rows", type=_count, default=2_000, help="conversations to prepare")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="what to measure")
    parser.add_argument("--processes", nargs="+", type=_count, default=[1, 2], help="numbers of processes")
    parser.add_argument("--repeats", type=_count, default=3, help="the best of so many runs counts")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--venvs", type=Path, default=VENVS, help="where the other toolkits are installed")
    parser.add_argument("--work", type=Path, help="where data and caches lie while it runs (default: the system's)")
    given = parser.parse_args()
    if not (TOKENIZER / "tokenizer.json").is_file():
        parser.error(f"{TOKENIZER} holds no tokenizer: run make model first")
    return given


def _count(text: str) -> int:
    """A whole number from 1 upwards, as `argparse` wants it read."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 upwards, found {text}")
    return int(text)


def _pythons(chosen: Sequence[Contender], venvs: Path) -> dict[str, Path]:
    """The interpreter of every contender that can be had here; a line for each that cannot."""
    pythons = {}
    for contender in chosen:
        try:
            pythons[contender.name] = _python(contender, venvs) if contender.requirements else Path(sys.executable)
        except Unavailable as reason:
            print(f"{contender.label} is left out: {reason}")
    return pythons


def _python(contender: Contender, venvs: Path) -> Path:
    """The interpreter of a toolkit's own environment, made when it is missing or holds other versions."""
    folder = venvs / contender.name
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
        raise Unavailable(f"it could not be installed (no network?): {_last_line(done.stderr)}")


def _measure(
    chosen: Sequence[Contender], pythons: dict[str, Path], given: argparse.Namespace, folder: Path
) -> list[Measured]:
    """All runs, the contenders in turn, in the opposite order in every other round."""
    results = {(one.name, n): Measured(one.name, one.label, n) for n in given.processes for one in chosen}
    broken: set[str] = set()
    for repeat in range(given.repeats):
        order = chosen if repeat % 2 == 0 else chosen[::-1]
        for contender, processes in ((one, n) for n in given.processes for one in order):
            if contender.name in broken:
                continue
            try:
                figures = _run(contender, pythons[contender.name], processes, folder)
            except Unavailable as reason:
                print(f"{contender.label} is left out: {reason}")
                broken.add(contender.name)
                continue
            results[contender.name, processes].runs.append(figures)
            rate = figures["rows"] / figures["seconds"]
            print(f"round {repeat + 1}, {processes} process(es), {contender.label}: {rate:,.0f}/s", flush=True)
    return [one for one in results.values() if one.runs]


def _run(contender: Contender, python: Path, processes: int, folder: Path) -> dict[str, Any]:
    cache, output = folder / "cache", folder / "figures.json"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    output.unlink(missing_ok=True)
    paths = {"data": folder / "data.json", "messages": folder / "messages.json", "tokenizer": TOKENIZER}
    task = {**paths, "processes": processes, "cache": cache, "output": output}
    command = [str(python), str(HERE / "peers" / contender.driver)]
    command += [str(part) for name, value in task.items() for part in (f"--{name}", value)]
    search = {} if contender.requirements else {"PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS_FOR_A_RUN,
            cwd=folder,
            env={**environment, **ONE_THREAD, **search},
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"a run took more than {SECONDS_FOR_A_RUN:,} s") from None
    if done.returncode or not output.is_file():
        raise Unavailable(f"its driver ended with status {done.returncode}: {_last_line(done.stderr)}")
    return json.loads(output.read_text())


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _machine() -> str:
    """Processor, usable cores, memory and Python, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {size:.0f} GiB, Python {platform.python_version()}"


def _print_table(results: Sequence[Measured]) -> None:
    from rich.console import Console
    from rich.table import Table

    best = {(one.name, one.processes): one for one in results}
    table = Table(
        title="preparation: conversations/s, as a share of the bare tokenizer's, by wall clock and by CPU time"
    )
    table.add_column("", no_wrap=True)
    for name in ("processes", "conv/s", "to bare", "conv/CPU s", "to bare", "scaling", "cores taken", "reading s"):
        table.add_column(name, justify="right")
    for name in ("second start s", "peak RSS MB", "largest child MB", "tokens"):
        table.add_column(name, justify="right")
    for one in results:
        bare, alone, facts = best.get(("bare", one.processes)), best.get((one.name, 1)), one.best
        table.add_row(
            one.label,
            str(one.processes),
            f"{one.rate:,.0f}",
            _figure(bare and one.rate / bare.rate, ".2f"),
            f"{one.cpu_rate:,.0f}",
            _figure(bare and one.cpu_rate / bare.cpu_rate, ".2f"),
            _figure(alone and one.rate / alone.rate, ".2f"),
            f"{facts['other_work_cores']:.1f}",
            _figure(facts.get("reading_seconds"), ".2f"),
            _figure(facts.get("second_start_seconds"), ".3f"),
            _figure(facts["peak_rss_bytes"] / 1e6, ",.0f"),
            _figure(facts["largest_child_rss_bytes"] / 1e6, ",.0f"),
            _figure(facts.get("tokens"), ",d"),
        )
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def _figure(value: float | None, form: str) -> str:
    return format(value, form) if value else ""


if __name__ == "__main__":
    main()
