"""Runs over several hosts: the command as it is typed on the first one, and what is read off it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from tests.helpers import hosts
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS, write_rows

SCRIPT = ROOT / "finetune/finetune.py"
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
LIMIT_SECONDS = 200
SECONDS_TO_END = 10  # for sessions that are just closing
# The launcher hands these on to every host; gloo alone would announce 127.0.0.1. Prepared data and compiled operators
# are those of the other tests.
ENVIRONMENT = (
    "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHF_HUB_OFFLINE=1\n"
    f"TORCH_EXTENSIONS_DIR={os.environ['TORCH_EXTENSIONS_DIR']}\nXDG_CACHE_HOME={os.environ['XDG_CACHE_HOME']}\n"
)


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
        """`finetune train`, typed on the first host."""
        words = (sys.executable, "-m", "finetune", "train", "--hostfile=hostfile", *launcher)
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
        script = () if "train" in words else (SCRIPT,)
        typed = ["env", *(f"{name}={value}" for name, value in values.items()), *words, *script, *named, *flags]
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

    def completed(self, run: subprocess.Popen, output: Path | None = None) -> str:
        """What a run said that came to its end."""
        said = self.ended(run, within=LIMIT_SECONDS)
        assert run.returncode == 0 and ((output or self.output) / "RUN_COMPLETE").is_file(), said
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


def until(process: subprocess.Popen, sign: str) -> str:
    """Read its output until a line holds `sign`."""
    said = ""
    for line in process.stdout:
        said += line
        if sign in line:
            return said
    raise AssertionError(f"{sign!r} was never said:\n{said}")


def find(node: hosts.Host, sign: str) -> int:
    """The Python process of a host whose command line holds `sign`; the ssh that typed it has the same words."""
    return next(n for n, line in node.processes().items() if sign in line and "python" in line.split()[0])


def left_behind(nodes: list[hosts.Host]) -> list[str]:
    """What still runs on the hosts; sessions that are just closing get a moment."""
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := [line for node in nodes for line in node.processes().values()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@contextmanager
def another_version(host: hosts.Host, library: str, version: str, folder: Path) -> Iterator[None]:
    """On this host alone the library is of another version."""
    installed = Path(str(distribution(library)._path)) / "METADATA"
    made = folder / f"{library}-METADATA"
    lines = installed.read_text(encoding="utf-8").splitlines(keepends=True)
    made.write_text("".join(f"Version: {version}\n" if line.startswith("Version:") else line for line in lines))
    with host.bound(made, installed):
        yield
