"""How fast conversations are prepared for training: the bare tokenizer, this project, and three other toolkits.

    python benchmarks/prepare.py                                          everything, 2,000 conversations
    python benchmarks/prepare.py --only bare finetune --rows 20000        no other toolkit
    python benchmarks/prepare.py --only bare finetune --tools              rows with tool calls and reasoning
    python benchmarks/prepare.py --only finetune --rows 1000000 --repeats 1

Every measurement is a process of its own with a fresh cache; the contenders take turns, so what else the machine does
hits all alike, and the best of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conversations import as_messages, conversations, tool_conversations, write_rows
from environments import (
    HERE,
    LLAMA_FACTORY,
    MS_SWIFT,
    PRETRAINED,
    ROOT,
    TRL,
    VENVS,
    Contender,
    Unavailable,
    last_line,
    machine,
    pythons_of,
)
from peers.measured import CHATML_WITH_TOOLS

SECONDS_FOR_A_RUN = 3_600
# One thread in each process, so that processes are what is compared.
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


CONTENDERS = (
    Contender("bare", "bare tokenizer", "bare_tokenizer.py"),
    Contender("finetune", "this project", "this_project.py"),
    Contender(
        "llamafactory",
        "LLaMA-Factory 0.9.5",
        "llama_factory.py",
        *LLAMA_FACTORY,
    ),
    Contender("trl", "TRL 1.16.0", "trl_sft.py", *TRL),
    Contender("swift", "ms-swift 4.6.0", "ms_swift.py", *MS_SWIFT),
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


def main() -> None:
    given = _arguments()
    chosen = [contender for contender in CONTENDERS if contender.name in given.only]
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=given.work) as folder:
        data, messages = Path(folder) / "data.json", Path(folder) / "messages.json"
        rows_of = tool_conversations if given.tools else conversations
        write_rows(data, rows_of(given.rows))
        if given.tools:
            data.with_suffix(".jinja").write_text(CHATML_WITH_TOOLS, "utf-8")
        if set(given.only) != {"finetune"}:
            write_rows(messages, map(as_messages, rows_of(given.rows)))
        print(f"{given.rows:,} conversations, {data.stat().st_size / 1e6:,.1f} MB; {machine()}")
        pythons = pythons_of(chosen, given.venvs)
        chosen = [contender for contender in chosen if contender.name in pythons]
        began, load = time.strftime("%Y-%m-%d %H:%M"), os.getloadavg()[0]
        results = _measure(chosen, pythons, given, Path(folder))
        facts = {"machine": machine(), "began": began, "load_at_begin": load, "load_at_end": os.getloadavg()[0]}
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
    parser.add_argument(
        "--tools", action="store_true", help="rows with tool calls and reasoning, for bare and finetune"
    )
    given = parser.parse_args()
    if given.tools and not {*given.only} <= {"bare", "finetune"}:
        parser.error("--tools: needs --only bare finetune: the others read such rows in forms of their own")
    if not (PRETRAINED / "tokenizer.json").is_file():
        parser.error(f"{PRETRAINED} holds no tokenizer: run make model first")
    return given


def _count(text: str) -> int:
    """A whole number from 1 upwards, as `argparse` wants it read."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 upwards, found {text}")
    return int(text)


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
    paths = {"data": folder / "data.json", "messages": folder / "messages.json", "tokenizer": PRETRAINED}
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
        raise Unavailable(f"its driver ended with status {done.returncode}: {last_line(done.stderr)}")
    return json.loads(output.read_text())


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
