"""The result of the doctor: facts by section, errors and warnings; and how a terminal shows them."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.utils.console import labelled, print_wrapped, rich_console, size
from finetune.utils.errors import FinetuneError

# In the order in which a run comes to them: it would end with the first that fails.
SECTIONS = ("command", "hosts", "configuration", "network", "data", "memory", "disk", "operators", "this host",
            "rehearsal")  # fmt: skip

Value = TypeVar("Value")
WIDTH_OF_A_FILE = 120
COLUMNS = ("host", "slots", "GPUs", "memory", "disk", "shm", "code", "files", "network", "status")


@dataclass(frozen=True)
class Finding:
    """An error or a warning."""

    section: str
    text: str
    status: int = 0  # exit status of a run with this error; 0: a warning
    host: str | None = None  # where it was found, if it concerns one host

    def __str__(self) -> str:
        return f"{self.host}: {self.text}" if self.host else self.text


@dataclass
class DoctorReport:
    """Facts by section, as JSON values, and the findings so far."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def attempt(self, section: str, action: Callable[[], Value]) -> Value | None:
        """Return what `action` returns, or None if it raises an error of this project, which becomes a finding.

        Equal texts are noted once: a missing model fails both the configuration and the data.
        """
        try:
            return action()
        except FinetuneError as error:
            known = {finding.text for finding in self.findings}
            for text in error.faults or (str(error),):
                if text not in known:
                    self.add_error(section, text, status=error.status)
            return None

    def add_error(self, section: str, text: str, *, status: int = 2, host: str | None = None) -> None:
        """Add an error that would end the run with this status."""
        self.findings.append(Finding(section, text, status, host))

    def add_errors(self, section: str, faults: Iterable[tuple[str, str]]) -> None:
        """Add errors of hosts: (host, text)."""
        for host, text in faults:
            self.add_error(section, text, host=host)

    def warn(self, section: str, text: str, *, host: str | None = None) -> None:
        """Add a warning."""
        self.add_error(section, text, status=0, host=host)

    @property
    def status(self) -> int:
        """Exit status that the run would have; 0 without errors."""
        errors = [finding for finding in self.findings if finding.status]
        return min(errors, key=lambda finding: SECTIONS.index(finding.section)).status if errors else 0


def print_report(report: DoctorReport, command: str) -> None:
    """Print everything on stdout; `command` starts the run."""
    console = rich_console(highlight=False, markup=False, emoji=False, soft_wrap=True, file=sys.stdout)
    facts = report.facts
    for title, lines in (
        ("Configuration", facts.get("configuration", {}).get("lines", [])),
        ("Data", facts.get("data", {}).get("lines", [])),
        ("Memory and disk", facts.get("memory", {}).get("lines", [])),
        ("This host", _machine(facts.get("this host", {}))),
        ("Network", _network(facts.get("network", {}))),
        ("Operators", _operators(facts.get("operators", {}))),
        ("Rehearsal", facts.get("rehearsal", {}).get("lines", [])),
    ):
        if lines:
            console.print(Text(f"\n{title}", style="bold"))
            for line in lines:
                print_wrapped(f"  {line}", sys.stdout)
    if facts.get("hosts"):
        if not console.is_terminal:
            console.width = WIDTH_OF_A_FILE
        console.print(Text("\nHosts", style="bold"))
        console.print(_table(facts, report))
    _print_findings(console, report, command)


def _print_findings(console: Console, report: DoctorReport, command: str) -> None:
    errors = [finding for finding in report.findings if finding.status]
    warnings = [finding for finding in report.findings if not finding.status]
    for title, style, findings in (("Errors", "bold red", errors), ("Warnings", "bold yellow", warnings)):
        if findings:
            console.print(Text(f"\n{title}", style=style))
        for number, finding in enumerate(findings, start=1):
            print_wrapped(f"  {number}. [{finding.section}] {finding}", sys.stdout)
    console.print()
    if report.status:
        console.print(Text(f"This run would end with status {report.status}.", style="bold red"))
    else:
        console.print(Text("No errors were found. To start the run:", style="bold green"))
        console.print(f"  {command}")


def _machine(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    gpus = ", ".join(f"{gpu['name']} {size(gpu['memory'])}" for gpu in facts["gpus"]) or "none"
    features = [name for name in ("bf16", "tf32") if facts[name]]
    cuda = f"CUDA {facts['cuda']}, NCCL {facts['nccl']}" if facts["cuda"] else "torch without CUDA"
    space, memory = facts["space"], facts["memory"]
    lines = {
        "name": f"{facts['name']}, {facts['cores']} cores, {size(memory['available'])} of {size(memory['total'])} "
        "memory free",
        "versions": f"Python {facts['python']}, {libraries}",
        "GPUs": f"{gpus}; {cuda}" + (f"; {', '.join(features)}" if features else ""),
        "free": f"{size(space['output']['free'])} for --output_dir (at {space['output']['at']}), "
        f"{size(space['shm']['free'])} in /dev/shm",
        "port": f"{facts['free_port']} is free",
    }
    return labelled(lines)


def _network(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    lines = {"rendezvous": f"{facts['address']}:{facts['port']} ({facts['backend']})"}
    names = {name for name in facts.get("interfaces", {}).values() if name}
    if names:
        lines["interface"] = ", ".join(sorted(names))
    reduced = facts.get("all_reduce")
    if reduced and reduced["bytes_per_second"]:
        rate = reduced["bytes_per_second"] / 1e9
        lines["all-reduce"] = f"{len(reduced['ranks'])} ranks, {rate:.2f} GB/s bus bandwidth of the slowest"
    wrote = facts.get("wrote")
    if wrote:
        kept = f"; the old file is now {wrote['aside']}" if wrote["aside"] else ""
        lines["wrote"] = f"{wrote['path']} ({', '.join(wrote['names'])}){kept}"
    return labelled(lines)


def _operators(facts: Mapping[str, Any]) -> list[str]:
    hosts_by_text: dict[str, list[str]] = {}
    for host, answer in facts.items():
        text = answer if isinstance(answer, str) else ", ".join(f"{name}: {state}" for name, state in answer.items())
        hosts_by_text.setdefault(text, []).append(host)
    return [text if len(facts) == 1 else f"{', '.join(hosts)}: {text}" for text, hosts in hosts_by_text.items()]


def _table(facts: Mapping[str, Any], report: DoctorReport) -> Table:
    table = Table(box=None, pad_edge=True, header_style="bold", padding=(0, 1))
    for name in COLUMNS:
        table.add_column(name, overflow="fold", no_wrap=name in ("host", "memory", "disk", "shm", "network"))
    network = facts.get("network", {})
    first: Mapping[str, Any] = next((host for host in facts["hosts"].values() if "error" not in host), {})
    for name, host in facts["hosts"].items():
        errors = sum(finding.host == name and finding.status != 0 for finding in report.findings)
        status = Text(f"{errors} error{'s' * (errors > 1)}", style="red") if errors else Text("ok", style="green")
        if "error" in host:
            table.add_row(name, str(host["slots"]), *["-"] * 7, status)
            continue
        gpus = f"{host['gpus']} x {host['gpu_facts'][0]['name']}" if host["gpu_facts"] else str(host["gpus"])
        space = (host["memory"]["total"], host["space"]["output"]["free"], host["space"]["shm"]["free"])
        same = ["same" if host[key] == first[key] else "differs" for key in ("code", "files")]
        seconds = network.get("round_trip_seconds", {}).get(name)
        interface = network.get("interfaces", {}).get(name) or ""
        way = f"{interface} {seconds * 1000:.1f} ms" if seconds is not None else "-"
        table.add_row(name, str(host["slots"]), gpus, *map(size, space), *same, way, status)
    return table
