"""Checks of this host, and of the operators that DeepSpeed compiles, on every host of the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.distributed import host_probe
from finetune.distributed.compat import is_file_open
from finetune.distributed.op_builder import build_operators
from finetune.distributed.process_setup import prepare_environment
from finetune.launcher import ssh
from finetune.launcher.ssh import SshShell
from finetune.preflight.findings import DoctorReport
from finetune.utils.proc import command_calling

SECONDS_TO_BUILD = 400
OLD_LOCK_SECONDS = 30
SECTION = "this host"


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
        "flash_attn": "flash-attn" in facts["versions"],
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
    for path, age in host_probe.locks(Path(os.environ["TORCH_EXTENSIONS_DIR"])):
        if age > OLD_LOCK_SECONDS and not is_file_open(Path(path)):
            text = f"{path} was left by a build that was interrupted {age / 60:,.0f} min ago: other tools wait for it"
            report.warn(SECTION, f"{text} forever; a run of this toolkit removes it")


def check_operators(
    report: DoctorReport, names: Sequence[str], hosts: Sequence[str], shell: SshShell, *, over_ssh: bool
) -> None:
    """Build the operators on all hosts at once: about a minute each the first time, then seconds.

    Args:
        over_ssh: False: `hosts` is this machine alone, whatever its name.
    """
    command, order = command_calling(prepare_environment, build_operators), json.dumps(list(names))

    def build(host: str) -> Any:
        return ssh.run_on_host(host, shell, command, order, SECONDS_TO_BUILD)

    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = dict(zip(hosts, pool.map(build, hosts if over_ssh else ["localhost"]), strict=True))
    for host, answer in answers.items():
        errors = {"operators": answer} if isinstance(answer, str) else answer
        for name, text in errors.items():
            if text:
                report.add_error("operators", f"DeepSpeed's {name} does not build: {text}", status=1, host=host)
    report.facts["operators"] = {
        host: answer if isinstance(answer, str) else {name: error or "built" for name, error in answer.items()}
        for host, answer in answers.items()
    }
