"""The run that the doctor checks: its command in parts, and the hosts of its ranks."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config import Arguments, DoctorArguments
from finetune.launcher import LauncherArgs, local_slots, ssh
from finetune.launcher.ssh import SshShell
from finetune.utils.proc import ROOT


@dataclass(frozen=True)
class PlannedRun:
    """A run to check, before its flags are resolved."""

    choice: DoctorArguments
    flags: LauncherArgs  # of the launcher
    slots: dict[str, list[int]] | None  # of the hostfile; None: this machine only
    words: list[str]  # of the training, as they were typed
    arguments: Arguments  # what the words say

    @property
    def use_cpu(self) -> bool:
        """Whether the ranks compute on CPUs although there may be GPUs."""
        return bool(self.arguments.given("use_cpu"))

    @property
    def shared_words(self) -> list[str]:
        """Words that may name files which every host needs; the base of an adapter is one that is not typed."""
        model = self.arguments.model
        base = [model.model_name_or_path] if model.adapter_name_or_path else []
        return list(dict.fromkeys([*ssh.shared_words(self.words), *base]))

    @property
    def shell(self) -> SshShell:
        """How hosts are reached."""
        return SshShell(self.flags.ssh_port, self.flags.venv_script)

    def probe_order(self) -> dict[str, Any]:
        """Return what hosts are asked for, as `distributed.host_probe.collect_host_facts` takes it."""
        output, temporary = self.arguments.training["output_dir"], os.environ.get("TMPDIR", "/tmp")
        places = {"output": output, "shm": "/dev/shm", "temporary": temporary}
        return {"places": places, "wanted": self.flags.master_port, "full": self.choice.full}

    def slots_by_host(self, gpus_here: int) -> dict[str, list[int]]:
        """Return host -> slots; without a hostfile those of this machine."""
        return self.slots or {os.uname().nodename: local_slots(self.flags, gpus_here)}

    def hosts_over_ssh(self) -> dict[str, list[int]] | None:
        """Return the hosts reached over ssh; None if the command is typed on each host, or there is only one."""
        return None if self.flags.no_ssh else self.slots

    def command(self) -> list[str]:
        """Return what a user types to start the run."""
        return ["finetune", "train", *self.flags.typed(), *self.words]

    def rehearsal(self, words: Sequence[str]) -> list[str]:
        """Return the same as a program and its arguments, with other words for the training."""
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from finetune.__main__ import main; main()"
        return [sys.executable, "-c", start, "train", *self.flags.typed(), *words]
