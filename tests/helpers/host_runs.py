"""Runs over several hosts: the command as it is typed on the first one, and what is read off it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers import hosts
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS, write_rows
from tests.hosts.test_launch import find, until
from tests.hosts.test_two_hosts import ENVIRONMENT, left_behind

__all__ = ["Cluster", "find", "left_behind", "until"]

SCRIPT = ROOT / "finetune/finetune.py"
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
LIMIT_SECONDS = 200


class Cluster:
    """Hosts, and a folder of the first that holds a hostfile, an environment, data, and what the runs leave."""

    def __init__(self, nodes: list[hosts.Host], folder: Path, model: Path) -> None:
        self.nodes, self.folder, self.model = nodes, folder, model
        self.output, self.data = folder / "output", folder / "data/rows.json"
        self.data.parent.mkdir()
        write_rows(self.data, ROWS)
        self.write_hostfile(*(f"{node.name} slots=1" for node in nodes))
        (folder / ".deepspeed_env").write_text(ENVIRONMENT)
        (folder / ".deepspeed_env").chmod(0o600)
        self.started: list[subprocess.Popen] = []

    def write_hostfile(self, *lines: str) -> None:
        (self.folder / "hostfile").write_text("".join(f"{line}\n" for line in lines))

    def start(self, *flags: str | Path, launcher: Sequence[str] = (), **environment: str | Path) -> subprocess.Popen:
        """`finetune launch`, typed on the first host."""
        words = (sys.executable, "-m", "finetune", "launch", "--hostfile=hostfile", *launcher)
        return self._type(words, flags, environment)

    def doctor(self, *flags: str | Path) -> tuple[int, dict[str, Any]]:
        """The status that `finetune doctor`, typed on the first host, ends with, and what it found, as JSON."""
        words = (sys.executable, "-m", "finetune", "doctor", "--json", "--hostfile=hostfile")
        run = self._type(words, flags, {})
        said, complained = run.communicate(timeout=LIMIT_SECONDS)
        assert "Traceback" not in complained, complained
        found = json.loads(said)
        assert found["status"] == run.returncode, complained
        assert left_behind(self.nodes) == []
        return run.returncode, found

    def start_deepspeed(self, *flags: str | Path, launcher: Sequence[str] = ()) -> subprocess.Popen:
        """The bare `deepspeed` command, with pdsh."""
        place = ("--no_ssh_check", "--master_addr", self.nodes[0].address)
        return self._type((DEEPSPEED, "--hostfile=hostfile", *place, *launcher), flags, {})

    def _type(self, words: Sequence, flags: Sequence, environment: dict) -> subprocess.Popen:
        named = ("--model_name_or_path", self.model, "--data_path", self.data)
        named += () if "--output_dir" in flags else ("--output_dir", self.output)
        values = {
            "DS_ACCELERATOR": "cpu",
            "PDSH_SSH_ARGS_APPEND": f"-F {self.nodes[0].folder / 'ssh_config'}",
            "PYTHONPATH": ROOT,  # this clone, whichever is installed
            "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],
            **environment,
        }
        typed = ["env", *(f"{name}={value}" for name, value in values.items()), *words, SCRIPT, *named, *flags]
        self.started.append(
            subprocess.Popen(
                self.nodes[0].command(typed, self.folder), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE if "--json" in words else subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
        return self.started[-1]

    def ended(self, run: subprocess.Popen, *, within: float, without: Sequence[hosts.Host] = ()) -> str:
        """What it said until it ended: in time, and with nothing left behind on any host but, maybe, `without`."""
        began = time.monotonic()
        said = run.communicate(timeout=LIMIT_SECONDS)[0]
        assert time.monotonic() - began < within, said
        assert left_behind([node for node in self.nodes if node not in without]) == [], said
        return said

    def completed(self, run: subprocess.Popen) -> str:
        """What a run said that came to its end."""
        said = self.ended(run, within=LIMIT_SECONDS)
        assert run.returncode == 0 and (self.output / "RUN_COMPLETE").is_file(), said
        return said

    def failed(
        self, run: subprocess.Popen, *named: str, within: float, status: int | None = None,
        without: Sequence[hosts.Host] = (),
    ) -> str:  # fmt: skip
        """The page, or all that was said, of a run that failed in time: no traceback in it, but these words."""
        said = self.ended(run, within=within, without=without)
        assert run.returncode not in (0, 75) if status is None else run.returncode == status, (run.returncode, said)
        page = said[said.index("The run failed") :] if "The run failed" in said else said
        assert "Traceback" not in page and all(word in page for word in named), said
        return page


@contextmanager
def cluster(nodes: list[hosts.Host], folder: Path, model: Path) -> Iterator[Cluster]:
    """A `Cluster` whose runs end with the block."""
    made = Cluster(nodes, folder, model)
    try:
        yield made
    finally:
        for one in made.started:
            one.kill()
            one.communicate()
        for node in nodes:
            node.end_processes()
