"""The status a process ends with."""

import os
import subprocess
import sys

import pytest

ABORTS_AT_ITS_END = """
import atexit, ctypes, sys
from finetune.utils.errors import CheckpointError, process_exit_guard, exit_on_error

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # as the destructor of a thread that still runs does
with {order}:
    atexit.register(print, "handlers of Python have run")
    {ending}
"""


@pytest.mark.parametrize("order", ["process_exit_guard(), exit_on_error()", "exit_on_error(), process_exit_guard()"])
@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("raise CheckpointError('a file is missing')", 4),
        ("sys.exit(75)", 75),
        ("sys.exit('words')", 1),
        ("raise ZeroDivisionError", 1),
        ("pass", 0),
    ],
)
def test_a_process_ends_with_its_own_status_and_not_with_that_of_a_destructor(ending, status, order):
    program = ABORTS_AT_ITS_END.format(order=order, ending=ending)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == status, done.stderr
    assert "handlers of Python have run" in done.stdout


def test_last_words_that_cannot_be_written_are_no_success():
    program = "from finetune.utils.errors import process_exit_guard\nwith process_exit_guard():\n    print('found')"
    with open("/dev/full", "w") as full:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run([sys.executable, "-c", program], stdout=full, env=buffered)

    assert done.returncode == 120
