"""What gloo reports on a rank whose peer was killed."""

import re
import signal
import socket
import subprocess
import sys

import pytest

from finetune.diagnostics import find_first_failure, is_secondary, likely_cause
from tests.helpers.failure_samples import at, died, raised
from tests.helpers.tiers import mostly_slow

WORKER = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
rank, port, operation = int(sys.argv[1]), sys.argv[2], sys.argv[3]
store = dist.TCPStore("127.0.0.1", int(port), 2, rank == 0, timeout=datetime.timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
values = torch.ones(8)
dist.all_reduce(values)
if rank == int(sys.argv[4]):
    os.kill(os.getpid(), signal.SIGKILL)
for _ in range(100):
    if operation == "all_reduce":
        dist.all_reduce(values)
    elif operation == "barrier":
        dist.barrier()
    elif operation == "all_gather_object":
        dist.all_gather_object([None, None], {"rank": rank})
    else:
        dist.new_group([0, 1])
"""


@pytest.mark.parametrize(
    ("operation", "victim"),
    mostly_slow([("all_reduce", 1), ("barrier", 0), ("all_gather_object", 1), ("new_group", 0)], [("all_reduce", 1)]),
)
def test_the_failure_of_a_rank_whose_peer_was_killed_is_secondary(tmp_path, operation, victim):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "worker.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, operation, str(victim)], stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert ranks[victim].returncode == -signal.SIGKILL
    assert ranks[1 - victim].returncode == 1
    trace = outputs[1 - victim]
    message = re.findall(r"^(?:\[rank\d\]: )?([\w.]+(?:Error|Exception): .*)", trace, re.MULTILINE)[-1]
    survivor = at(1.0, raised(message, traceback=trace), 1 - victim)
    assert is_secondary(survivor), message
    assert likely_cause(survivor).code == "peer-failed"
    killed = at(1.4, died(9, phase="step", step=1), victim)
    assert find_first_failure([survivor, killed]) == killed
