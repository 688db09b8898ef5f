"""Checks of the hosts of a run, in parallel: what each has, how they differ, the network, compiled operators."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.distributed.compat import is_file_open
from finetune.distributed.op_builder import build_operators
from finetune.distributed.process_setup import prepare_environment
from finetune.launcher import (
    ENVIRONMENT_FILE,
    environment_of_ranks,
    network_check,
    read_environment_file,
    ssh,
    write_environment_file,
)
from finetune.launcher.ssh import SshShell
from finetune.preflight.doctor_report import DoctorReport
from finetune.preflight.planned_run import PlannedRun
from finetune.utils.errors import StorageError
from finetune.utils.proc import command_calling

MAX_CLOCK_SKEW = 2.0
MIN_SHARED_MEMORY = 256 << 20  # for the buffers of NCCL and of DeepSpeed on CPUs
INTERFACES = ("NCCL_SOCKET_IFNAME", ssh.GLOO_INTERFACE)
SHOWN_FACTS = ("name", "python", "versions", "cores", "memory", "gpus", "gpu_facts", "space", "interfaces", "programs",
               "code", "files")  # fmt: skip
Answers = Mapping[str, dict[str, Any]]
SECONDS_TO_BUILD = 400
OLD_LOCK_SECONDS = 30
SECTION = "this host"


def check_hosts(report: DoctorReport, run: PlannedRun, slots: Mapping[str, list[int]]) -> Answers:
    """Probe all hosts, note their facts and findings, and return the answers of those that gave one."""
    answers = ssh.probe_hosts(list(slots), run.shell, run.shared_words, run.probe_order())
    report.add_errors("hosts", ssh.faults_of(answers, slots))
    answered = {
        host: with_gpus_of(slots[host], answer)
        for host, answer in answers.items()
        if not isinstance(answer, str) and "space" in answer
    }
    for host, facts in answered.items():
        check_host(report, host, facts, len(slots[host]))
    first = next(iter(slots))
    if first in answered and answered[first]["wanted_is_taken"]:
        text = f"port {run.flags.master_port} is taken: "
        if "master_port" in run.flags.given:
            report.add_error("network", text + "give another --master_port, or leave the flag out", host=first)
        else:
            text += "`deepspeed` needs another --master_port; `finetune train` finds one"
            report.warn("network", text, host=first)
    if len(slots) > 1 and shutil.which("pdsh") is None:
        text = "pdsh is not on this machine: `deepspeed` needs it for several hosts; `finetune train` does not"
        report.warn("hosts", text)
    report.facts["hosts"] = {
        host: {"slots": len(ids)}
        | ({name: answered[host][name] for name in SHOWN_FACTS} if host in answered else {"error": answers[host]})
        for host, ids in slots.items()
    }
    return answered


def with_gpus_of(slots: Sequence[int], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a host with those of its GPUs that have these numbers; of unlike ones CUDA decides which."""
    gpus = facts["gpu_facts"]
    if len({gpu["name"] for gpu in gpus}) > 1:
        return facts
    return {**facts, "gpu_facts": [gpus[slot] for slot in slots if slot < len(gpus)]}


def check_host(report: DoctorReport, host: str, facts: Mapping[str, Any], slots: int) -> None:
    """Check one host by itself."""
    output = facts["space"]["output"]
    if not output["writable"]:
        text = f"--output_dir cannot be made: {output['at']} may not be written to"
        report.add_error("disk", text, status=StorageError.status, host=host)
    if facts["space"]["shm"]["free"] < MIN_SHARED_MEMORY:
        free = facts["space"]["shm"]["free"] >> 20
        text = f"/dev/shm has {free:,} MiB left: ranks of a host communicate through it; give a container --shm-size=1g"
        report.warn("hosts", text, host=host)
    if not facts["deepspeed"]:
        report.add_error("hosts", "the `deepspeed` command is not next to its Python: pip install deepspeed", host=host)
    early, late = facts["time"] - facts["asked"][1], facts["time"] - facts["asked"][0]
    skew = early if early > 0 else min(late, 0.0)
    if abs(skew) > MAX_CLOCK_SKEW:
        text = f"its clock is {abs(skew):,.0f} s {'ahead' if skew > 0 else 'behind'}: synchronise it (chrony, ntp)"
        report.warn("hosts", text, host=host)
    if 0 < slots < facts["gpus"]:
        report.warn("hosts", f"{facts['gpus'] - slots} of its {facts['gpus']} GPUs are not used", host=host)
    busy = [gpu["used"] for gpu in facts["gpu_facts"] if gpu["used"] > gpu["memory"] * 0.1]
    if busy:
        text = f"{len(busy)} GPUs are in use by others (up to {max(busy) / 2**30:.1f} GiB)"
        report.warn("hosts", text, host=host)


# ---- the network


def check_network(
    report: DoctorReport, run: PlannedRun, slots: Mapping[str, list[int]], answers: Answers, backend: str
) -> None:
    """Check the way to the rendezvous and the interface, then run an all-reduce over all ranks.

    Hosts that did not answer are left out; if one is missing, or its code, there is no all-reduce.
    """
    missing = [host for host in slots if host not in answers or answers[host]["code"] is None]
    slots = {host: ids for host, ids in slots.items() if host in answers}
    if sum(map(len, slots.values())) < 2:
        return
    first = next(iter(slots))
    given: dict[str, Any] = {"address": run.flags.master_addr, "port": run.flags.given.get("master_port")}
    rendezvous = report.attempt("network", lambda: ssh.rendezvous_address(answers, **given))
    environment = report.attempt("network", environment_of_ranks)
    if rendezvous is None or environment is None:
        return
    address, port = rendezvous
    facts: dict[str, Any] = {"address": address, "port": port, "backend": backend}
    report.facts["network"] = facts
    ways = network_check.check_rendezvous(list(slots), run.shell, address, port)
    facts |= {"interfaces": ways.interfaces, "round_trip_seconds": ways.seconds}
    report.add_errors("network", ways.faults)
    if ways.faults:
        return
    others = {host: name for host, name in ways.interfaces.items() if host != first}
    name_of_first = next((name for name, own in answers[first]["interfaces"].items() if address in own), None)
    facts["interfaces"] = {first: name_of_first, **others}
    if run.choice.write_env:
        environment |= _write_environment(report, facts, backend, slots, answers)
    _check_interfaces(report, environment, answers)
    if missing or any(finding.status for finding in report.findings if finding.section == "network"):
        return
    ranks, faults = network_check.all_reduce(
        slots, run.shell, address=address, port=port, backend=backend, environment=environment,
        interfaces=facts["interfaces"],
    )  # fmt: skip
    report.add_errors("network", faults)
    if backend == "gloo" and len(slots) > 1 and ssh.GLOO_INTERFACE not in environment:
        text = f"{ssh.GLOO_INTERFACE} is not set: `deepspeed` may need it (--write_env); `finetune train` sets it"
        report.warn("network", text)
    slowest = None if faults else min(rank["bytes_per_second"] for rank in ranks)
    facts["all_reduce"] = {"bytes_per_second": slowest, "ranks": ranks}


def _check_interfaces(report: DoctorReport, environment: Mapping[str, str], answers: Answers) -> None:
    """Check that a named interface is on every host. NCCL takes prefixes, `=` before exact names and `^` to exclude."""
    for variable in INTERFACES:
        names = environment.get(variable, "")
        if not names or names.startswith("^"):
            continue
        exactly = names.startswith("=") or variable.startswith("GLOO")
        wanted = names.removeprefix("=").split(",")
        for host, facts in answers.items():
            there = list(facts["interfaces"])
            if not any(own == name or (not exactly and own.startswith(name)) for name in wanted for own in there):
                text = f"{variable}={names}: there is no such interface, only {', '.join(there)}"
                report.add_error("network", text, host=host)


def _write_environment(
    report: DoctorReport, facts: dict[str, Any], backend: str, slots: Mapping[str, list[int]], answers: Answers
) -> dict[str, str]:
    """Add the interface that connects the hosts to `.deepspeed_env`; return its values."""
    names = {name for name in facts["interfaces"].values() if name}
    added: dict[str, str] = {}
    present: dict[str, str] = {}
    if len(names) == 1:
        added = dict.fromkeys(INTERFACES, names.pop())
    else:
        text = f"interfaces have different names ({facts['interfaces']}): NCCL gets all of them, gloo takes one"
        report.warn("network", text)
        added = {"NCCL_SOCKET_IFNAME": ",".join(sorted(names))} if names else {}
    if backend == "gloo":
        threads = min(max(1, answers[host]["cores"] // len(ids)) for host, ids in slots.items())
        present = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    path = Path(ENVIRONMENT_FILE)
    present |= read_environment_file(path) if path.is_file() else {}
    aside = report.attempt("network", lambda: write_environment_file(path, {**present, **added}))
    values = {**present, **added}
    facts["wrote"] = {"path": str(path.absolute()), "names": list(values), "aside": str(aside) if aside else None}
    return values


def check_machine(report: DoctorReport, facts: Mapping[str, Any]) -> None:
    """Note versions, devices and space of this host, with the facts of `host_probe`; warn of abandoned build locks."""
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    is_ampere = bool(gpus) and all(gpu.major >= 8 for gpu in gpus)
    report.facts[SECTION] = {
        **{key: facts[key] for key in ("name", "python", "versions", "cores", "memory", "space")},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "gpus": [
            {"name": gpu.name, "memory": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in gpus
        ],
        "bf16": is_ampere,
        "tf32": is_ampere,
        "free_port": facts["port"],
    }
    if facts["gpus"] and not gpus:
        reason = (
            "its build has no CUDA: install the one for your CUDA"
            if torch.version.cuda is None
            else f"its CUDA {torch.version.cuda} needs a newer driver, or CUDA_VISIBLE_DEVICES hides them"
        )
        report.warn(SECTION, f"nvidia-smi sees {facts['gpus']} GPUs, torch {torch.__version__} sees none: {reason}")
    if facts["programs"]["c++"] is False and facts["programs"]["g++"] is False:
        report.warn(SECTION, "DeepSpeed needs a C++ compiler, and there is none: apt-get install g++")
    for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("**/lock"):
        with suppress(FileNotFoundError):  # the build is done
            age = time.time() - path.stat().st_mtime
            if age > OLD_LOCK_SECONDS and not is_file_open(path):
                text = f"{path} was left by a build that was interrupted {age / 60:,.0f} min ago: other tools wait for"
                report.warn(SECTION, f"{text} it forever; a run of this toolkit removes it")


def check_operators(report: DoctorReport, names: Sequence[str], hosts: Sequence[str], shell: SshShell | None) -> None:
    """Build the operators on all hosts at once; without a `shell` on this machine alone, whatever its name.

    It takes about a minute the first time, then seconds.
    """
    command, order = command_calling(prepare_environment, build_operators), json.dumps(list(names))
    answers = ssh.run_program_on_hosts(dict.fromkeys(hosts, order), shell, command, SECONDS_TO_BUILD)
    for host, answer in answers.items():
        errors = {"operators": answer} if isinstance(answer, str) else answer
        for name, text in errors.items():
            if text:
                report.add_error("operators", f"DeepSpeed's {name} does not build: {text}", status=1, host=host)
    report.facts["operators"] = {
        host: answer if isinstance(answer, str) else {name: error or "built" for name, error in answer.items()}
        for host, answer in answers.items()
    }
