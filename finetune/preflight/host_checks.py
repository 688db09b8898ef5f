"""Every host of a run, asked in parallel: what it has, how it differs, the way to where the ranks meet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.hardware import AMPERE, DetectedHardware, Gpu
from finetune.launcher import (
    ENVIRONMENT_FILE,
    LauncherArgs,
    environment_of_ranks,
    network_check,
    read_environment_file,
    ssh,
    write_environment_file,
)
from finetune.launcher.ssh import SshShell
from finetune.preflight.findings import DoctorReport
from finetune.utils.errors import StorageError

SECONDS_OF_SKEW = 2.0
SHARED_MEMORY_WANTED = 256 << 20  # NCCL's and DeepSpeed's CPU rings live there
INTERFACES = ("NCCL_SOCKET_IFNAME", ssh.GLOO_INTERFACE)
Answers = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Places:
    """Where a run writes, by what; and the port it was told to meet at (DeepSpeed's own by default)."""

    output: str
    port: int
    port_was_given: bool
    full: bool = False

    def order(self) -> dict[str, Any]:
        """As `distributed.host_probe.collect_host_facts` takes it."""
        places = {"output": self.output, "shm": "/dev/shm", "temporary": os.environ.get("TMPDIR", "/tmp")}
        extensions = os.environ["TORCH_EXTENSIONS_DIR"]
        return {"places": places, "wanted": self.port, "extensions": extensions, "full": self.full}


def examine_hosts(
    examination: DoctorReport, slots: Mapping[str, list[int]], shell: SshShell, words: Sequence[str], places: Places
) -> Answers:
    """Ask all; what is wrong becomes findings, what is there facts. Returns the answers of those that gave one."""
    answers = ssh.probe_hosts(list(slots), shell, ssh.shared_words(words), places.order())
    examination.add_errors("hosts", ssh.faults_of(answers, slots))
    found = {host: answer for host, answer in answers.items() if not isinstance(answer, str) and "space" in answer}
    for host, facts in found.items():
        look_closely(examination, host, facts, len(slots[host]))
    first = next(iter(slots))
    if first in found and found[first]["wanted_is_taken"]:
        if places.port_was_given:
            text = f"port {places.port} is taken: give another --master_port, or leave the flag out"
            examination.add_error("network", text, host=first)
        else:
            text = f"port {places.port} is taken: `deepspeed` needs another --master_port; `finetune launch` finds one"
            examination.warn("network", text, host=first)
    if len(slots) > 1 and shutil.which("pdsh") is None:
        text = "pdsh is not on this machine: `deepspeed` needs it for several hosts; `finetune launch` does not"
        examination.warn("hosts", text)
    examination.facts["hosts"] = {
        host: {"slots": len(ids), **({"error": answers[host]} if host not in found else _shown(found[host]))}
        for host, ids in slots.items()
    }
    return found


def look_closely(examination: DoctorReport, host: str, facts: Mapping[str, Any], slots: int) -> None:
    """What one host has or lacks by itself."""
    output = facts["space"]["output"]
    if not output["writable"]:
        text = f"--output_dir cannot be made: {output['at']} may not be written to"
        examination.add_error("disk", text, status=StorageError.status, host=host)
    if facts["space"]["shm"]["free"] < SHARED_MEMORY_WANTED:
        free = facts["space"]["shm"]["free"] >> 20
        text = f"/dev/shm has {free:,} MiB left: ranks of a host talk through it; a container needs --shm-size=1g or so"
        examination.warn("hosts", text, host=host)
    if not facts["deepspeed"]:
        examination.add_error(
            "hosts", "the `deepspeed` command is not beside its Python: pip install deepspeed", host=host
        )
    early, late = facts["time"] - facts["asked"][1], facts["time"] - facts["asked"][0]
    skew = early if early > 0 else min(late, 0.0)
    if abs(skew) > SECONDS_OF_SKEW:
        text = f"its clock is {abs(skew):,.0f} s {'ahead' if skew > 0 else 'behind'}: synchronise it (chrony, ntp)"
        examination.warn("hosts", text, host=host)
    if 0 < slots < facts["gpus"]:
        examination.warn("hosts", f"{facts['gpus'] - slots} of its {facts['gpus']} GPUs are not used", host=host)
    busy = [one for one in facts["gpu_facts"] if one["used"] > one["memory"] * 0.1]
    if busy:
        text = f"{len(busy)} GPUs are in use by others (up to {max(one['used'] for one in busy) / 2**30:.1f} GiB)"
        examination.warn("hosts", text, host=host)


def _shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a host's answer is told."""
    kept = ("name", "python", "versions", "cores", "memory", "gpus", "gpu_facts", "space", "interfaces", "programs")
    return {name: facts[name] for name in kept} | {"code": facts["code"], "files": facts["files"]}


def probe_of(answers: Answers, *, use_cpu: bool) -> DetectedHardware:
    """What ranks on these hosts can do, from what the hosts' own tools say; this machine may have no GPU."""
    gpus = []
    for facts in answers.values():
        known = [tuple(int(part) for part in one["capability"].split(".")) for one in facts["gpu_facts"]]
        gpus += [Gpu(one["name"], kind) for one, kind in zip(facts["gpu_facts"], known, strict=True)]
        # A tool too old to say what they can do: what hosts get in a data centre since 2020.
        gpus += [Gpu("GPU", AMPERE)] * (facts["gpus"] - len(known))
    has_flash = all("flash-attn" in facts["versions"] for facts in answers.values())
    return DetectedHardware(gpus=() if use_cpu else tuple(gpus), flash_attn=has_flash)


# ---- the way between them


def examine_network(
    examination: DoctorReport,
    slots: Mapping[str, list[int]],
    shell: SshShell,
    answers: Answers,
    *,
    flags: LauncherArgs,
    backend: str,
    writes_environment: bool,
) -> None:
    """The way to where ranks meet, the interface to name, then an all-reduce among all of them.

    Hosts that did not answer are left out; without one of them, or its code, nothing is reduced.
    """
    missing = [host for host in slots if host not in answers or answers[host]["code"] is None]
    slots = {host: ids for host, ids in slots.items() if host in answers}
    if sum(map(len, slots.values())) < 2:
        return
    first = next(iter(slots))
    given = {"address": flags.master_addr, "port": flags.given.get("master_port")}
    meeting = examination.attempt("network", lambda: ssh.rendezvous_address(answers, **given))
    environment = examination.attempt("network", environment_of_ranks)
    if meeting is None or environment is None:
        return
    address, port = meeting
    facts: dict[str, Any] = {"address": address, "port": port, "backend": backend}
    examination.facts["network"] = facts
    ways = network_check.check_rendezvous(list(slots), shell, address, port)
    facts |= {"interfaces": ways.interfaces, "round_trip_seconds": ways.seconds}
    examination.add_errors("network", ways.faults)
    if ways.faults:
        return
    others = {host: name for host, name in ways.interfaces.items() if host != first}
    name_of_first = _interface_of(address, answers[first]["interfaces"])
    facts["interfaces"] = {first: name_of_first, **others}
    if writes_environment:
        environment |= _write_environment(examination, facts, backend, slots, answers)
    _check_interfaces(examination, environment, answers)
    if examination.failed("network") or missing:
        return
    reduction = network_check.all_reduce(
        slots, shell, address=address, port=port, backend=backend, environment=environment,
        interfaces=facts["interfaces"],
    )  # fmt: skip
    examination.add_errors("network", reduction.faults)
    if backend == "gloo" and len(slots) > 1 and ssh.GLOO_INTERFACE not in environment:
        text = f"{ssh.GLOO_INTERFACE} is not set: `deepspeed` may need it (--write_env); `finetune launch` sets it"
        examination.warn("network", text)
    facts["all_reduce"] = {"bytes_per_second": reduction.bytes_per_second, "ranks": reduction.ranks}


def _interface_of(address: str, interfaces: Mapping[str, str]) -> str | None:
    return next((name for name, own in interfaces.items() if own == address), None)


def _check_interfaces(examination: DoctorReport, environment: Mapping[str, str], answers: Answers) -> None:
    """A named interface has to be on every host. NCCL takes prefixes, `=` in front of whole names and `^` for not."""
    for variable in INTERFACES:
        names = environment.get(variable, "")
        if not names or names.startswith("^"):
            continue
        exactly = names.startswith("=") or variable.startswith("GLOO")
        wanted = names.removeprefix("=").split(",")
        for host, facts in answers.items():
            there = list(facts["interfaces"])
            if not any(own == one or (not exactly and own.startswith(one)) for one in wanted for own in there):
                text = f"{variable}={names}: it has no such interface, but {', '.join(there)}"
                examination.add_error("network", text, host=host)


def _write_environment(
    examination: DoctorReport, facts: dict[str, Any], backend: str, slots: Mapping[str, list[int]], answers: Answers
) -> dict[str, str]:
    """Write `.deepspeed_env`: what it had, and the interface that joins the hosts; returns what was added."""
    names = {name for name in facts["interfaces"].values() if name}
    added: dict[str, str] = {}
    present: dict[str, str] = {}
    if len(names) == 1:
        added = dict.fromkeys(INTERFACES, names.pop())
    else:
        text = f"interfaces have other names on other hosts ({facts['interfaces']}): NCCL is given all, gloo takes one"
        examination.warn("network", text)
        added = {"NCCL_SOCKET_IFNAME": ",".join(sorted(names))} if names else {}
    if backend == "gloo":
        threads = min(max(1, answers[host]["cores"] // len(ids)) for host, ids in slots.items())
        present = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    path = Path(ENVIRONMENT_FILE)
    present |= read_environment_file(path) if path.is_file() else {}
    aside = examination.attempt("network", lambda: write_environment_file(path, {**present, **added}))
    values = {**present, **added}
    facts["wrote"] = {"path": str(path.absolute()), "names": list(values), "aside": str(aside) if aside else None}
    return values
