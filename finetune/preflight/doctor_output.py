"""What an examination found, for a terminal: facts by section, one table of the hosts, what to mend at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.preflight.findings import DoctorReport

LABEL_WIDTH = 12
WIDTH_OF_A_FILE = 120
GIB = 2**30


def print_report(examination: DoctorReport, command: str) -> None:
    """Print all of it on stdout."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, file=sys.stdout)
    facts = examination.facts
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
                console.print(f"  {line}")
    if facts.get("hosts"):
        if not console.is_terminal:
            console.width = WIDTH_OF_A_FILE
        console.print(Text("\nHosts", style="bold"))
        console.print(_table(facts, examination))
    _show_findings(console, examination, command)


def labelled(facts: Mapping[str, str]) -> list[str]:
    """One line a fact, its name in front."""
    return [f"{label:<{LABEL_WIDTH}}{text}" for label, text in facts.items()]


def size(number: float) -> str:
    """Bytes for people: 1.5 GiB, 12 MiB."""
    if number >= GIB / 2:
        return f"{number / GIB:,.1f} GiB"
    return f"{number / 2**20:,.0f} MiB"


def _show_findings(console: Console, examination: DoctorReport, command: str) -> None:
    ending = [one for one in examination.findings if one.status]
    warnings = [one for one in examination.findings if not one.status]
    if ending:
        console.print(Text("\nTo mend", style="bold red"))
        for number, one in enumerate(ending, start=1):
            console.print(f"  {number}. [{one.section}] {one}")
    if warnings:
        console.print(Text("\nTo know", style="bold yellow"))
        for one in warnings:
            console.print(f"  - [{one.section}] {one}")
    console.print()
    if examination.status:
        console.print(Text(f"This run would end with status {examination.status}.", style="bold red"))
    else:
        console.print(Text("Nothing was found that would end this run. Start it with:", style="bold green"))
        console.print(f"  {command}")


def _machine(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    libraries = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    gpus = ", ".join(f"{one['name']} {size(one['memory'])}" for one in facts["gpus"]) or "none"
    can = [name for name in ("bf16", "tf32", "flash_attn") if facts[name]]
    cuda = f"CUDA {facts['cuda']}, NCCL {facts['nccl']}" if facts["cuda"] else "torch without CUDA"
    space = facts["space"]
    return labelled(
        {
            "name": f"{facts['name']}, {facts['cores']} cores, {size(facts['memory']['available'])} of "
            f"{size(facts['memory']['total'])} memory free",
            "versions": f"Python {facts['python']}, {libraries}",
            "GPUs": f"{gpus}; {cuda}" + (f"; {', '.join(can)}" if can else ""),
            "free": f"{size(space['output']['free'])} for --output_dir (at {space['output']['at']}), "
            f"{size(space['shm']['free'])} in /dev/shm",
            "port": f"{facts['free_port']} is free",
        }
    )


def _network(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    lines = {"meeting": f"{facts['address']}:{facts['port']} ({facts['backend']})"}
    names = {name for name in facts.get("interfaces", {}).values() if name}
    if names:
        lines["interface"] = f"{', '.join(sorted(names))} joins the hosts"
    reduced = facts.get("all_reduce")
    if reduced and reduced["bytes_per_second"]:
        rate = reduced["bytes_per_second"] / 1e9
        lines["all-reduce"] = f"{len(reduced['ranks'])} ranks, {rate:.2f} GB/s bus bandwidth of the slowest"
    wrote = facts.get("wrote")
    if wrote:
        kept = f"; what was there is now {wrote['aside']}" if wrote["aside"] else ""
        lines["wrote"] = f"{wrote['path']} ({', '.join(wrote['names'])}){kept}"
    return labelled(lines)


def _operators(facts: Mapping[str, Any]) -> list[str]:
    merged: dict[str, list[str]] = {}
    for host, answer in facts.items():
        text = answer if isinstance(answer, str) else ", ".join(f"{name}: {state}" for name, state in answer.items())
        merged.setdefault(text, []).append(host)
    return [text if len(facts) == 1 else f"{', '.join(hosts)}: {text}" for text, hosts in merged.items()]


def _table(facts: Mapping[str, Any], examination: DoctorReport) -> Table:
    table = Table(box=None, pad_edge=True, header_style="bold", padding=(0, 1))
    for name in ("host", "slots", "GPUs", "memory", "disk", "shm", "code", "files", "way", "found"):
        table.add_column(name, overflow="fold", no_wrap=name in ("host", "memory", "disk", "shm", "way"))
    network = facts.get("network", {})
    answered = [one for one in facts["hosts"].values() if "error" not in one]
    for host, one in facts["hosts"].items():
        count = sum(finding.host == host and finding.status != 0 for finding in examination.findings)
        verdict = Text("ok", style="green") if not count else Text(f"{count} to mend", style="red")
        if "error" in one:
            table.add_row(host, str(one["slots"]), *["-"] * 7, verdict)
            continue
        gpus = f"{one['gpus']} x {one['gpu_facts'][0]['name']}" if one["gpu_facts"] else str(one["gpus"])
        seconds = network.get("round_trip_seconds", {}).get(host)
        interface = network.get("interfaces", {}).get(host) or ""
        way = f"{interface} {seconds * 1000:.1f} ms" if seconds is not None else "-"
        alike = {name: "same" if one[name] == answered[0][name] else "differs" for name in ("code", "files")}
        table.add_row(
            host, str(one["slots"]), gpus, size(one["memory"]["total"]), size(one["space"]["output"]["free"]),
            size(one["space"]["shm"]["free"]), alike["code"], alike["files"], way, verdict,
        )  # fmt: skip
    return table
