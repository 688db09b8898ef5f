"""A port is taken while a process listens there."""

from __future__ import annotations

import socket

from finetune.distributed import host_probe


def test_a_port_is_taken_while_somebody_listens_there():
    port = host_probe.free_port()
    assert not host_probe.is_taken(port)
    with socket.create_server(("", port)):
        assert host_probe.is_taken(port)
    assert not host_probe.is_taken(port)
    assert host_probe.machine() == host_probe.machine() != ""
