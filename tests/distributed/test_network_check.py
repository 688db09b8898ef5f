"""The ways between hosts, tried on this one: by either kind of address, by ranks that talk a lot."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from finetune.distributed.host_probe import free_port
from finetune.launcher import allreduce_benchmark, network_check
from finetune.launcher.network_check import find_ways
from finetune.launcher.ssh import SshShell


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probing:
            probing.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_hosts_greet_each_other_where_ranks_would_meet(address):
    if address == "::1" and not has_ipv6():
        pytest.skip("IPv6 is switched off here")
    ways = find_ways(["localhost"], SshShell(None, None), address, free_port())
    assert ways.faults == [] and 0 < ways.seconds["localhost"] < 5


def test_a_port_that_is_taken_is_a_fault_of_the_first_host(monkeypatch):
    monkeypatch.setattr(network_check, "SECONDS_TO_MEET", 3)
    with socket.create_server(("", 0)) as taken:
        ways = find_ways(["localhost"], SshShell(None, None), "127.0.0.1", taken.getsockname()[1])
    assert [host for host, _ in ways.faults] == ["localhost"]
    assert "where the ranks meet: Address already in use: give another --master_port" in ways.faults[0][1]


def outcome(program: str) -> dict:
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return allreduce_benchmark._outcome(3, process, time.monotonic() + 30)


def test_what_a_rank_measured_is_found_among_what_its_libraries_say():
    answer = f"print({allreduce_benchmark.ANSWER!r} + '{{\"rank\": 3}}')"
    said = f"print('NCCL INFO Channel 00'); {answer}; print('NCCL INFO Destroy')"
    assert outcome(said) == {"rank": 3}
    assert outcome("print('NCCL INFO Destroy')") == {"rank": 3, "error": "it said nothing"}
    assert outcome("raise SystemExit('no route to host')") == {"rank": 3, "error": "no route to host"}
