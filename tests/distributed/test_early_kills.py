"""A command that is killed in its first seconds leaves no process: not its launcher, no rank, no watchdog."""

import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.faults

BIN = Path(sys.executable).parent
COMMANDS = {"deepspeed": [BIN / "deepspeed"], "launch": [BIN / "finetune", "launch"]}
# Seconds after the command was typed, after `deepspeed.launcher.launch` is there, and after the first rank is.
MOMENTS = [
    ("", 0.1), ("", 1), ("deepspeed.launcher.launch", 0), ("deepspeed.launcher.launch", 1),
    ("--local_rank=0", 0), ("--local_rank=0", 0.3), ("--local_rank=0", 1.5), ("--local_rank=0", 3),
]  # fmt: skip
SECONDS_TO_END = 12  # five on an idle machine: the launcher imports DeepSpeed before it starts ranks that end it


def family(mark: str) -> list[psutil.Process]:
    """All processes that have a variable of this value, whatever their parents are."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):
            if mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.append(process)
    return found


def find(mark: str, word: str) -> psutil.Process | None:
    """The first of them that has this word in its command line."""
    for process in family(mark):
        with suppress(psutil.Error):
            if word in process.cmdline():
                return process
    return None


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("victim", ["", "deepspeed.launcher.launch"])
def test_nothing_outlives_a_command_that_is_killed_early(command, victim, tiny_model, conversation_file, tmp_path):
    words = ["--num_gpus", "2", "finetune/finetune.py", "--model_name_or_path", tiny_model, "--data_path",
             conversation_file, "--max_steps", "3", "--deepspeed", "zero2", "--output_dir"]  # fmt: skip
    seconds_to_end = {}
    for sign, delay in MOMENTS[4:] if victim else MOMENTS:
        mark, output = uuid.uuid4().hex, tmp_path / f"{sign}{delay}"
        run = subprocess.Popen(
            list(map(str, [*COMMANDS[command], *words, output])), cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "MARK": mark, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while sign and not find(mark, sign):
            time.sleep(0.02)
        time.sleep(delay)
        (find(mark, victim) if victim else run).kill()
        began = time.monotonic()
        run.wait()
        while family(mark) and time.monotonic() - began < 60:
            time.sleep(0.05)
        seconds_to_end[sign, delay] = round(time.monotonic() - began, 1)
        assert not (output / "RUN_COMPLETE").exists()
    assert max(seconds_to_end.values()) < SECONDS_TO_END, seconds_to_end
