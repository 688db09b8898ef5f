"""The run that is examined: its command in parts, and where its ranks would be."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.config import Arguments, DoctorArguments, parse
from finetune.config.run_config import RankCounts
from finetune.launcher import LauncherArgs, local_slots, resolve_resources, ssh
from finetune.launcher.ssh import SshShell
from finetune.preflight.host_checks import ProbeOrder
from finetune.utils.proc import ROOT

SCRIPT = ROOT / "finetune" / "finetune.py"


@dataclass(frozen=True)
class PlannedRun:
    """`slots` are those of the hostfile, None for this machine alone; `words` are the training's own."""

    choice: DoctorArguments
    flags: LauncherArgs
    words: list[str]
    arguments: Arguments
    slots: dict[str, list[int]] | None
    shell: SshShell
    places: ProbeOrder

    def slots_by_host(self, gpus_here: int) -> dict[str, list[int]]:
        """Host -> slots, of this machine where there is no hostfile."""
        return self.slots or {os.uname().nodename: local_slots(self.flags, gpus_here)}

    def hosts_to_ask(self) -> dict[str, list[int]] | None:
        """Those that are reached over ssh; None where the command is typed on each host, or there is one only."""
        return None if self.slots is None or self.flags.no_ssh else self.slots

    def launch(self, script: str, words: Sequence[str]) -> list[str]:
        """The arguments of `finetune launch` that start the training on these hosts."""
        return [*self.flags.typed(without=("module",)), script, *words]

    def command(self) -> list[str]:
        """What a user types to start the run."""
        script = os.path.relpath(SCRIPT)
        return ["finetune", "launch", *self.launch(str(SCRIPT) if script.startswith("..") else script, self.words)]

    def rehearsal(self, words: Sequence[str]) -> list[str]:
        """The same, as a program and its arguments, with other words for the training."""
        start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from finetune.__main__ import main; main()"
        return [sys.executable, "-c", start, "launch", *self.launch(str(SCRIPT), words)]


def plan_run(choice: DoctorArguments, flags: LauncherArgs, words: Sequence[str]) -> PlannedRun:
    """Read the command as the run would.

    Raises:
        ConfigError: a flag of the training, the hostfile, a filter of it.
    """
    arguments = parse(words)
    resources = resolve_resources(flags)
    places = ProbeOrder(
        output=arguments.training["output_dir"],
        port=flags.master_port,
        port_was_given="master_port" in flags.given,
        full=choice.full,
    )
    shell = SshShell(flags.ssh_port, flags.venv_script)
    return PlannedRun(choice, flags, list(words), arguments, resources.slots if resources else None, shell, places)


def world_of(slots: dict[str, list[int]]) -> RankCounts:
    """How many ranks there are, and how many on the fullest host."""
    counts = [len(ids) for ids in slots.values()]
    return RankCounts(sum(counts), max(counts))


def shared(run: PlannedRun) -> list[str]:
    """Words of the training that may name what every host must have alike."""
    return ssh.shared_words(run.words)
