"""Inject random faults into real two-rank runs, and check after each what must hold.

    .venv/bin/python benchmarks/soak.py --model M --minutes 240 --seed 0

One run of 40 steps is started again after each fault until it is complete; its weights and losses must equal those of
the run that nobody disturbed. After each fault: the exit status is right, every process is gone within SECONDS_TO_END
and the time that the undisturbed run took, and no complete checkpoint is lost. The table of faults is printed as
Markdown. As root the tool runs in a mount and network namespace of its own (`unshare`): the output folders lie on a
small tmpfs that is filled, and `lo`, over which the ranks talk, is cut. Without root these faults are left out.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STEPS, SECONDS_TO_END = 40, 45
COMMANDS = {"launch": [BIN / "finetune", "launch"], "deepspeed": [BIN / "deepspeed"]}
RANK, WATCHDOG, LAUNCHER = "--local_rank=1", "watchdog_process.py", "deepspeed.launcher.launch"
IN_NAMESPACES = "FINETUNE_SOAK_IN_NAMESPACES"
CUT_SECONDS = 4  # shorter than any limit of the run
FULL_DISK, SHORT_CUT, ASKED = "no space", "network cut for 4 s", "command asked to stop"
NO_INODES = "no inodes"


@contextmanager
def signalled(number: signal.Signals, victim: psutil.Process, _: Path) -> Iterator[None]:
    """Send a signal."""
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(number)
    yield


@contextmanager
def no_space(_: psutil.Process, disk: Path) -> Iterator[None]:
    """Fill the disk."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    yield
    filler.unlink()


@contextmanager
def no_inodes(_: psutil.Process, disk: Path) -> Iterator[None]:
    """Use up the files that the disk may have."""
    folder = disk / "files"
    folder.mkdir()
    with suppress(OSError):
        for number in range(10**6):
            (folder / str(number)).touch()
    yield
    shutil.rmtree(folder)


@contextmanager
def network_cut(seconds: float | None, _: psutil.Process, __: Path) -> Iterator[None]:
    """Cut the network, for some seconds or until all processes are gone."""
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    if seconds is None:
        yield
    else:
        time.sleep(seconds)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if seconds is not None:
        yield


Fault = Callable[[psutil.Process, Path], AbstractContextManager[None]]
# Fault -> (word in the command line of its victim, or None: the command itself; what is done to it).
FAULTS: dict[str, tuple[str | None, Fault]] = {
    "rank killed": (RANK, partial(signalled, signal.SIGKILL)),
    "rank 0 killed": ("--local_rank=0", partial(signalled, signal.SIGKILL)),
    "rank stopped": (RANK, partial(signalled, signal.SIGSTOP)),
    "watchdog killed": (WATCHDOG, partial(signalled, signal.SIGKILL)),
    "watchdog stopped": (WATCHDOG, partial(signalled, signal.SIGSTOP)),
    "launcher killed": (LAUNCHER, partial(signalled, signal.SIGKILL)),
    "command killed": (None, partial(signalled, signal.SIGKILL)),
    ASKED: (None, partial(signalled, signal.SIGTERM)),
}
FAULTS_AS_ROOT: dict[str, tuple[str | None, Fault]] = {
    FULL_DISK: (RANK, no_space),
    NO_INODES: (RANK, no_inodes),
    "network cut": (RANK, partial(network_cut, None)),
    SHORT_CUT: (RANK, partial(network_cut, CUT_SECONDS)),
}
# Fault -> exit statuses of `finetune launch`; any other fault: what it is but 0, unless the run is complete.
STATUSES = {ASKED: {0, 75}, FULL_DISK: {0, 6}, NO_INODES: {0, 6}}


def main() -> None:
    """Run until the time is over; status 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "data/identity.json")
    parser.add_argument("--minutes", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="FAULT", help=f"of: {', '.join([*FAULTS, *FAULTS_AS_ROOT])}")
    given = parser.parse_args()
    is_root = os.geteuid() == 0
    if is_root and IN_NAMESPACES not in os.environ:
        os.environ[IN_NAMESPACES] = "1"
        os.execvp("unshare", ["unshare", "--mount", "--net", sys.executable, *sys.argv])
    faults = {**FAULTS, **(FAULTS_AS_ROOT if is_root else {})}
    faults = {name: faults[name] for name in given.only or faults}
    deadline, draw = time.monotonic() + 60 * given.minutes, random.Random(given.seed)
    seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="finetune-soak-") as folder, small_disk(Path(folder), is_root) as disk:
        soak = Soak(Path(folder), disk, given.model, given.data)
        whole = soak.until_complete(Path(folder) / "whole")
        for number in range(10**6):
            output = disk / f"run{number}"
            while time.monotonic() < deadline and not (output / "RUN_COMPLETE").exists():
                command, fault = draw.choice(sorted(COMMANDS)), draw.choice(sorted(faults))
                took, broken = soak.inject(output, command, fault, faults[fault], draw.uniform(0, 12))
                if took is not None:
                    seconds[fault, command].append(took)
                violations += [f"run {number}, {fault} ({command}): {text}" for text in broken]
                if broken:
                    print(fault, command, broken, (Path(folder) / "log").read_text()[-6000:], sep="\n", file=sys.stderr)
            if time.monotonic() >= deadline:
                break
            found = result_of(output)
            if found != whole:
                kept = shutil.copytree(output, Path(tempfile.mkdtemp(prefix="finetune-soak-run-")) / output.name)
                violations.append(f"run {number}: {found} is not the undisturbed {whole}; it is kept in {kept}")
            shutil.rmtree(output)
    print("| fault | command | times | seconds to the last process gone, median | longest |\n|---|---|---|---|---|")
    for (fault, command), values in sorted(seconds.items()):
        print(f"| {fault} | {command} | {len(values)} | {statistics.median(values):.1f} | {max(values):.1f} |")
    print(f"\n{sum(map(len, seconds.values()))} faults, {len(violations)} violations", *violations, sep="\n")
    sys.exit(bool(violations))


@contextmanager
def small_disk(folder: Path, is_root: bool) -> Iterator[Path]:
    """A folder for the runs, which root can fill; with it, a network of this process and its children alone."""
    disk = folder / "disk"
    disk.mkdir()
    if is_root:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m,nr_inodes=2000", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        if is_root:
            subprocess.run(["umount", "--lazy", disk], check=True)


class Soak:
    """Runs with the same flags, each a family of processes that is known by a variable of its own."""

    seconds = 0.0  # that the undisturbed run took: limits of a start begin late on a slow machine

    def __init__(self, folder: Path, disk: Path, model: Path, data: Path) -> None:
        self.folder, self.disk, self.model, self.data = folder, disk, model.absolute(), data.absolute()

    def start(self, output: Path, command: str, mark: str, start_timeout: int = 30) -> subprocess.Popen[bytes]:
        """Start, or resume, the run in `output`."""
        flags = (
            f"--deepspeed zero2 --use_lora True --max_steps {STEPS} --logging_steps 1 --save_strategy steps "
            "--save_steps 5 --per_device_train_batch_size 1 --save_total_limit 0 --write_report False "
            f"--meeting_timeout 20 --start_timeout {start_timeout} --step_timeout 15 "
            "--save_timeout 15 --resume_from_checkpoint auto"
        ).split()
        named = ["--model_name_or_path", self.model, "--data_path", self.data, "--output_dir", output]
        words = [*COMMANDS[command], "--num_gpus", "2", ROOT / "finetune/finetune.py", *named, *flags]
        environment = {"TORCH_EXTENSIONS_DIR": str(self.folder / "operators"), **os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "FINETUNE_SOAK": mark}
        log = (self.folder / "log").open("wb")
        return subprocess.Popen(list(map(str, words)), cwd=ROOT, env=environment, stdout=log, stderr=log)

    def until_complete(self, output: Path) -> tuple[str, list[float]]:
        """Run undisturbed, and return the result."""
        began = time.monotonic()
        run = self.start(output, "launch", "", start_timeout=600)  # operators are compiled
        assert run.wait() == 0, (self.folder / "log").read_text()[-3000:]
        self.seconds = time.monotonic() - began
        return result_of(output)

    def inject(
        self, output: Path, command: str, name: str, fault: tuple[str | None, Fault], delay: float
    ) -> tuple[float | None, list[str]]:
        """Start the run and inject a fault; return the seconds to the last process gone, and what did not hold.

        The seconds are None where the run ended before the fault.
        """
        mark, violations = uuid.uuid4().hex, []
        complete, steps = checkpoints(output), steps_logged(output)
        run = self.start(output, command, mark)
        word, disturb = fault
        while (victim := _find(mark, word) if word else psutil.Process(run.pid)) is None and run.poll() is None:
            time.sleep(0.05)
        began = time.monotonic()
        while run.poll() is None and time.monotonic() - began < delay:
            time.sleep(0.05)
        was_running, was_in_steps = run.poll() is None, steps_logged(output) > steps
        began = time.monotonic()
        if victim is not None and was_running:
            with disturb(victim, self.disk):
                while _family(mark) and time.monotonic() - began < 4 * SECONDS_TO_END:
                    run.poll()
                    time.sleep(0.05)
        took = time.monotonic() - began
        if took > SECONDS_TO_END + self.seconds:
            violations.append(f"processes were left after {took:.0f} s: {[one.cmdline()[:6] for one in _family(mark)]}")
        for process in _family(mark):
            process.kill()
        status, is_complete = run.wait(), (output / "RUN_COMPLETE").exists()
        if was_running and command == "launch" and status == 0 and not is_complete:
            violations.append("status 0 of a run that is not complete")
        if status not in STATUSES.get(name, {status}) and command == "launch":
            violations.append(f"status {status}")
        if name == SHORT_CUT and was_in_steps and not is_complete:
            violations.append(f"status {status}: the run did not continue")
        violations += [f"{name} was lost, or changed" for name, digest in complete.items()
                       if checkpoints(output).get(name) != digest]  # fmt: skip
        return took if was_running else None, violations


def checkpoints(output: Path) -> dict[str, str]:
    """Return the complete checkpoints, with a digest of each manifest, which has those of all files."""
    manifests = output.glob("checkpoint-*/manifest.json")
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in manifests}


def result_of(output: Path) -> tuple[str, list[float]]:
    """Return a digest of the saved weights, and the loss of each step."""
    digest = hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()
    return digest, [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps_logged(output: Path) -> int:
    """Return how many steps metrics.jsonl has."""
    path = output / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _family(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if f"FINETUNE_SOAK={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.append(process)
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def _find(mark: str, word: str) -> psutil.Process | None:
    for process in _family(mark):
        try:
            if any(part.endswith(word) for part in process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


if __name__ == "__main__":
    main()
