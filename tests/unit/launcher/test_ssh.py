"""Hosts are asked and compared: what differs is named, by host, in seconds."""

import ast
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.distributed import host_probe
from finetune.launcher import ssh
from finetune.utils.errors import ConfigError

FACTS = {
    "name": "node0", "python": "3.11.7", "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "gpus": 8,
    "port": 4000, "route": ["10.0.0.1", "10.0.0.5"], "interfaces": {}, "folder": True, "code": "aa",
    "files": {"data.json": "11", "model": "22"},
}  # fmt: skip
SLOTS = {"node0": list(range(8)), "node1": list(range(8))}


def compared(**changed: object) -> str:
    with pytest.raises(ConfigError) as caught:
        ssh.compare_hosts({"node0": FACTS, "node1": {**FACTS, "name": "node1", **changed}}, SLOTS)
    return str(caught.value)


def test_hosts_that_are_alike_are_accepted():
    ssh.compare_hosts({"node0": FACTS, "node1": {**FACTS, "name": "node1", "port": 5000}}, SLOTS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"python": "3.10.2"}, "node1: Python 3.10.2, but 3.11.7 on node0"),
        ({"versions": {"torch": "2.9.1", "deepspeed": "0.19.8"}}, "node1: torch 2.9.1, but 2.13.0 on node0"),
        ({"versions": {"torch": "2.13.0"}}, "node1: deepspeed not installed, but 0.19.8 on node0"),
        ({"gpus": 4}, "node1: 8 slots for 4 GPUs"),
        ({"gpus": 0}, "node1: 0 GPUs, but 8 on node0"),
        ({"folder": False}, "node1: has no folder"),
        ({"code": None}, "node1: has no "),
        ({"code": "bb"}, "differs from that on node0: bring both to the same commit"),
        ({"files": {"data.json": "12", "model": "22"}}, "node1: data.json differs from that on node0"),
        ({"files": {"model": "22"}}, "node1: data.json is missing"),
        ({"files": {**FACTS["files"], "extra": "1"}}, "node1: extra is there, but not on node0"),
    ],
)
def test_what_differs_is_named_by_host(changed, message):
    assert message in compared(**changed)


def test_all_faults_of_all_hosts_are_named_at_once():
    said = compared(python="3.10.2", code="bb", gpus=4)
    assert said.startswith("3 faults:") and said.endswith("nothing was started")


def test_a_machine_under_two_names_is_named_with_both():
    slots = {name: list(range(8)) for name in ("node0", "node1", "10.0.0.6")}
    with pytest.raises(ConfigError, match="^10.0.0.6: is the same machine as node1: one line with the slots of both"):
        ssh.compare_hosts(
            {"node0": {**FACTS, "machine": "a"}, **{name: {**FACTS, "machine": "b"} for name in list(slots)[1:]}}, slots
        )


def test_ranks_meet_where_ssh_came_and_not_at_a_loopback():
    here = {**FACTS, "route": []}
    there = {**FACTS, "route": ["10.0.0.9", "10.0.0.6"]}
    assert ssh.rendezvous_address({"a": FACTS, "b": there}) == ("10.0.0.5", 4000)
    assert ssh.rendezvous_address({"a": here, "b": there}) == ("10.0.0.9", 4000)
    assert ssh.rendezvous_address({"a": here}) == ("127.0.0.1", 4000)
    assert ssh.rendezvous_address({"a": here, "b": there}, address="ib0.node0", port=29500) == ("ib0.node0", 29500)
    with pytest.raises(ConfigError, match="give --master_addr"):
        ssh.rendezvous_address({"a": here, "b": {**there, "route": ["127.0.0.1", "127.0.0.1"]}})


def test_gloo_is_told_the_interface_that_ssh_came_through_unless_the_user_has():
    here = {
        **FACTS,
        "route": [],
        "interfaces": {"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "ib0": ["10.0.0.9", "fd00::9"]},
    }
    there = {
        **FACTS,
        "route": ["10.0.0.9", "10.0.0.6"],
        "interfaces": {"lo": ["127.0.0.1"], "eth1": ["10.0.0.6", "fd00::6"]},
    }
    unknown = {**there, "interfaces": {"lo": ["127.0.0.1"]}}
    silent = "did not answer"
    found = ssh.interfaces_between({"a": here, "b": there, "c": unknown, "d": silent})
    assert found == {"a": "ib0", "b": "eth1"}
    assert ssh.interfaces_between({"a": here}) == {}
    assert ssh.add_interface({"A": "1"}, "ib0") == {"A": "1", "GLOO_SOCKET_IFNAME": "ib0"}
    assert ssh.add_interface({"GLOO_SOCKET_IFNAME": "eth7"}, "ib0") == {"GLOO_SOCKET_IFNAME": "eth7"}
    assert ssh.add_interface({"A": "1"}, None) == {"A": "1"}


def test_options_of_ssh_that_no_shell_would_read_are_named(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o 'ProxyJump=bastion")
    with pytest.raises(ConfigError, match="^PDSH_SSH_ARGS_APPEND=-o 'ProxyJump=bastion: No closing quotation"):
        ssh.SshShell(None, None).options()


@pytest.mark.parametrize(("name", "here"), [("localhost", True), (os.uname().nodename, True), ("no-such.host", False)])
def test_this_machine_is_known_by_its_names(name, here):
    assert ssh.is_here(name) is here


@pytest.mark.parametrize(("name", "here"), [("user@192.0.2.7", True), ("192.0.2.8", False), ("fd00::7", True)])
def test_this_machine_is_known_by_the_addresses_of_its_interfaces(monkeypatch, name, here):
    addresses = [SimpleNamespace(address=address) for address in ("192.0.2.7", "fd00::7%eth0")]
    monkeypatch.setattr(ssh.psutil, "net_if_addrs", lambda: {"eth0": addresses})
    assert ssh.is_here(name) is here


def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(host_probe, "WHOLE_BYTES", 1 << 20)
    monkeypatch.chdir(tmp_path)
    path = Path("big.jsonl")
    path.write_bytes(bytes(8 << 20))
    order = {"folder": str(tmp_path), "code": str(tmp_path), "words": ["big.jsonl"]}
    before = host_probe.collect_host_facts(order)["files"]
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    after = host_probe.collect_host_facts(order)["files"]
    assert json.dumps(before) != json.dumps(after) and before.keys() == after.keys()


def test_options_of_the_user_come_first_and_a_longer_time_to_connect_is_given_to_probes(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F conf -o ConnectTimeout=40")
    shell = ssh.SshShell(22, None)
    assert shell.options()[:4] == ["-F", "conf", "-o", "ConnectTimeout=40"] and shell.extra_seconds() == 35
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND")
    assert shell.extra_seconds() == 0


def test_what_is_sent_to_a_host_needs_no_library_there():
    """A host whose environment is broken is the one that must answer."""
    nodes = list(ast.walk(ast.parse(Path(str(host_probe.__file__)).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {"socket", "pathlib"} <= names
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
