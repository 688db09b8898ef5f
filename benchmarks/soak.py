"""Inject random faults into real two-rank runs, and check after each what must hold.

    .venv/bin/python benchmarks/soak.py --model M --minutes 240 --seed 0

One run of 40 steps is started again after each fault until it is complete; its weights and losses must equal those of
the run that nobody disturbed. After each fault: the exit status is right, every process is gone within SECONDS_TO_END,
and no complete checkpoint is lost. The table of faults is printed as Markdown.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STEPS, SECONDS_TO_END = 40, 45
COMMANDS = {"launch": [BIN / "finetune", "launch"], "deepspeed": [BIN / "deepspeed"]}
# Fault -> (word in the victim's command line, signal); None: the command itself.
VICTIMS = {
    "rank killed": ("--local_rank=1", signal.SIGKILL),
    "rank 0 killed": ("--local_rank=0", signal.SIGKILL),
    "rank stopped": ("--local_rank=1", signal.SIGSTOP),
    "watchdog killed": ("watchdog_process.py", signal.SIGKILL),
    "watchdog stopped": ("watchdog_process.py", signal.SIGSTOP),
    "launcher killed": ("deepspeed.launcher.launch", signal.SIGKILL),
    "command killed": (None, signal.SIGKILL),
    "command asked to stop": (None, signal.SIGTERM),
}


def main() -> None:
    """Run until the time is over; status 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=ROOT / "data/identity.json")
    parser.add_argument("--minutes", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    deadline, draw = time.monotonic() + 60 * given.minutes, random.Random(given.seed)
    seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="finetune-soak-") as folder:
        soak = Soak(Path(folder), given.model, given.data)
        whole = soak.until_complete(Path(folder) / "whole")
        for number in range(10**6):
            output = Path(folder) / f"run{number}"
            while time.monotonic() < deadline and not (output / "RUN_COMPLETE").exists():
                command, fault = draw.choice(sorted(COMMANDS)), draw.choice(sorted(VICTIMS))
                took, faults = soak.inject(output, command, fault, draw.uniform(0, 12))
                seconds[fault, command].append(took)
                violations += [f"run {number}, {fault} ({command}): {text}" for text in faults]
            if time.monotonic() >= deadline:
                break
            if result_of(output) != whole:
                violations.append(f"run {number}: its result is not that of the undisturbed run")
    print("| fault | command | times | seconds to the last process gone, median | longest |\n|---|---|---|---|---|")
    for (fault, command), values in sorted(seconds.items()):
        print(f"| {fault} | {command} | {len(values)} | {statistics.median(values):.1f} | {max(values):.1f} |")
    print(f"\n{sum(map(len, seconds.values()))} faults, {len(violations)} violations", *violations, sep="\n")
    sys.exit(bool(violations))


class Soak:
    """Runs with the same flags, each a family of processes that is known by a variable of its own."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder, model, data

    def start(self, output: Path, command: str, mark: str) -> subprocess.Popen[bytes]:
        """Start, or resume, the run in `output`."""
        flags = (
            f"--deepspeed zero2 --use_lora True --max_steps {STEPS} --logging_steps 1 --save_strategy steps "
            "--save_steps 5 --per_device_train_batch_size 1 --save_total_limit 0 --write_report False "
            "--start_timeout 30 --step_timeout 15 --save_timeout 15 --resume_from_checkpoint auto"
        ).split()
        named = ["--model_name_or_path", self.model, "--data_path", self.data, "--output_dir", output]
        words = [*COMMANDS[command], "--num_gpus", "2", ROOT / "finetune/finetune.py", *named, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "FINETUNE_SOAK": mark}
        log = (self.folder / "log").open("ab")
        return subprocess.Popen(list(map(str, words)), cwd=ROOT, env=environment, stdout=log, stderr=log)

    def until_complete(self, output: Path) -> tuple[str, list[float]]:
        """Run undisturbed, and return the result."""
        assert self.start(output, "launch", "").wait() == 0, (self.folder / "log").read_text()[-3000:]
        return result_of(output)

    def inject(self, output: Path, command: str, fault: str, delay: float) -> tuple[float, list[str]]:
        """Start the run and inject a fault; return the seconds to the last process gone, and what did not hold."""
        mark, violations = uuid.uuid4().hex, []
        complete = checkpoints(output)
        run = self.start(output, command, mark)
        word, number = VICTIMS[fault]
        while (victim := _find(mark, word) if word else psutil.Process(run.pid)) is None and run.poll() is None:
            time.sleep(0.05)
        began = time.monotonic()
        while run.poll() is None and time.monotonic() - began < delay:
            time.sleep(0.05)
        began = time.monotonic()
        was_running = run.poll() is None
        if victim is not None and victim.is_running():
            victim.send_signal(number)
        while _family(mark) and time.monotonic() - began < 4 * SECONDS_TO_END:
            run.poll()
            time.sleep(0.05)
        took = time.monotonic() - began
        if took > SECONDS_TO_END:
            violations.append(f"processes were left after {took:.0f} s: {[one.cmdline()[:6] for one in _family(mark)]}")
        for process in _family(mark):
            process.kill()
        status, is_complete = run.wait(), (output / "RUN_COMPLETE").exists()
        if was_running and command == "launch" and status == 0 and not is_complete:
            violations.append("status 0 of a run that is not complete")
        if fault == "command asked to stop" and command == "launch" and status not in (0, 75):
            violations.append(f"status {status} of a run that was asked to stop")
        violations += [f"{name} was lost, or changed" for name, digest in complete.items()
                       if checkpoints(output).get(name) != digest]  # fmt: skip
        return took, violations


def checkpoints(output: Path) -> dict[str, str]:
    """Return the complete checkpoints, with a digest of each manifest, which has those of all files."""
    manifests = output.glob("checkpoint-*/manifest.json")
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in manifests}


def result_of(output: Path) -> tuple[str, list[float]]:
    """Return a digest of the saved weights, and the loss of each step."""
    digest = hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()
    return digest, [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


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
