"""This host by itself, and whether the operators that DeepSpeed compiles build on every host of the run."""

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


def examine_machine(examination: DoctorReport, facts: Mapping[str, Any]) -> None:
    """Versions, devices, what they can do, space; locks that a build left behind. `facts`: of a closer look."""
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    examination.facts["this host"] = {
        "name": facts["name"],
        "python": facts["python"],
        "versions": facts["versions"],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "gpus": [
            {"name": one.name, "memory": one.total_memory, "capability": f"{one.major}.{one.minor}"} for one in gpus
        ],
        "bf16": bool(gpus) and all(one.major >= 8 for one in gpus),
        "tf32": bool(gpus) and all(one.major >= 8 for one in gpus),
        "flash_attn": "flash-attn" in facts["versions"],
        "cores": facts["cores"],
        "memory": facts["memory"],
        "space": facts["space"],
        "free_port": facts["port"],
    }
    if facts["gpus"] and not gpus:
        text = (
            f"nvidia-smi sees {facts['gpus']} GPUs, but torch {torch.__version__} does not: "
            + ("its build has no CUDA: install the one for your CUDA" if torch.version.cuda is None
               else f"its CUDA {torch.version.cuda} needs a newer driver, or CUDA_VISIBLE_DEVICES hides them")
        )  # fmt: skip
        examination.warn("this host", text)
    if facts["programs"]["c++"] is False and facts["programs"]["g++"] is False:
        examination.warn("this host", "there is no C++ compiler, which DeepSpeed needs: apt-get install g++")
    for path, age in host_probe.locks(Path(os.environ["TORCH_EXTENSIONS_DIR"])):
        if age > OLD_LOCK_SECONDS and not is_file_open(Path(path)):
            text = f"{path} was left by a build that was interrupted {age / 60:,.0f} min ago: other tools wait for it"
            examination.warn("this host", f"{text} for ever; a run of this toolkit removes it")


def examine_operators(
    examination: DoctorReport, names: Sequence[str], hosts: Sequence[str], shell: SshShell, *, over_ssh: bool
) -> None:
    """Build them, on every host at once: a minute each where they are not built yet, a few seconds where they are.

    Without `over_ssh` there is one host, and this machine is it, whatever its name.
    """
    command = command_calling(prepare_environment, build_operators)

    def one(host: str) -> Any:
        return ssh.run_on_host(
            host if over_ssh else "localhost", shell, command, json.dumps(list(names)), SECONDS_TO_BUILD
        )

    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = dict(zip(hosts, pool.map(one, hosts), strict=True))
    for host, answer in answers.items():
        errors = (
            {"operators": answer} if isinstance(answer, str) else {name: text for name, text in answer.items() if text}
        )
        for name, text in errors.items():
            examination.add_error("operators", f"DeepSpeed's {name} does not build: {text}", status=1, host=host)
    examination.facts["operators"] = {
        host: answer if isinstance(answer, str) else {name: error or "built" for name, error in answer.items()}
        for host, answer in answers.items()
    }
