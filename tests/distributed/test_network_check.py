"""The ways between hosts, tried on this one: by either kind of address, by ranks that talk a lot."""

import os
import socket
import sys
import time

import pytest

from finetune.distributed.host_probe import free_port
from finetune.launcher import network_check
from finetune.launcher.network_check import check_rendezvous
from finetune.launcher.ssh import SshShell


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_hosts_connect_to_the_rendezvous(address):
    if address == "::1" and not has_ipv6():
        pytest.skip("IPv6 is switched off here")
    routes = check_rendezvous(["localhost"], SshShell(None, None), address, free_port())
    assert routes.faults == [] and 0 < routes.seconds["localhost"] < 5


def test_a_port_in_use_is_a_fault_of_the_first_host(monkeypatch):
    monkeypatch.setattr(network_check, "SECONDS_TO_CONNECT", 3)
    with socket.create_server(("", 0)) as taken:
        routes = check_rendezvous(["localhost"], SshShell(None, None), "127.0.0.1", taken.getsockname()[1])
    assert [host for host, _ in routes.faults] == ["localhost"]
    assert "Address already in use: give another --master_port" in routes.faults[0][1]


def result_of(program: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(network_check, "command_calling", lambda _: [sys.executable, "-c", program])
    return network_check._run_rank({"rank": 3}, {**os.environ}, time.monotonic() + 30)


def test_the_result_of_a_rank_is_found_among_the_output_of_its_libraries(monkeypatch):
    result = f"print({network_check.RESULT_PREFIX!r} + '{{\"rank\": 3}}')"
    noisy = f"print('NCCL INFO Channel 00'); {result}; print('NCCL INFO Destroy')"
    assert result_of(noisy, monkeypatch) == {"rank": 3}
    assert result_of("print('NCCL INFO Destroy')", monkeypatch) == {"rank": 3, "error": "it printed nothing"}
    assert result_of("raise SystemExit('no route to host')", monkeypatch) == {"rank": 3, "error": "no route to host"}
