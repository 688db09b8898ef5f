"""Hosts are asked and compared: what differs is named, by host, in seconds."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path

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


def test_a_gpu_tool_that_hangs_is_no_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(host_probe, "SECONDS_FOR_A_PROGRAM", 0.2)
    assert host_probe.count_gpus() == 0 and host_probe.gpu_facts() == []


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
    here = {**FACTS, "route": [], "interfaces": {"lo": "127.0.0.1", "docker0": "172.17.0.1", "ib0": "10.0.0.9"}}
    there = {**FACTS, "route": ["10.0.0.9", "10.0.0.6"], "interfaces": {"lo": "127.0.0.1", "eth1": "10.0.0.6"}}
    unknown = {**there, "interfaces": {"lo": "127.0.0.1"}}
    silent = "did not answer"
    found = ssh.interfaces_between({"a": here, "b": there, "c": unknown, "d": silent})
    assert found == {"a": "ib0", "b": "eth1"}
    assert ssh.interfaces_between({"a": here}) == {}
    assert ssh.add_interface({"A": "1"}, "ib0") == {"A": "1", "GLOO_SOCKET_IFNAME": "ib0"}
    assert ssh.add_interface({"GLOO_SOCKET_IFNAME": "eth7"}, "ib0") == {"GLOO_SOCKET_IFNAME": "eth7"}
    assert ssh.add_interface({"A": "1"}, None) == {"A": "1"}


@pytest.fixture
def ssh_program(tmp_path, monkeypatch):
    """A program of that name in front of the real one; it notes its words, and does as the host's name says."""
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$*" >> {tmp_path}/words
case "$*" in
  *" refuses "*) echo "ssh: connect to host refuses port 22: Connection refused" >&2; exit 255;;
  *" hangs "*) exec sleep 60;;
  *" foreign "*) printf '\\273\\266\\323\\255' >&2; printf '\\273\\266\\323\\255\\n'; exit 0;;
  *" chatty "*) echo Welcome; exit 0;;
  *" nopython "*) echo "sh: python: not found" >&2; exit 127;;
  *) for last; do :; done; exec sh -c "$last";;
esac
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(ssh, "SECONDS_TO_PROBE", 5)
    return tmp_path / "words"


def test_each_host_says_what_it_has_or_why_it_did_not_answer(ssh_program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.json").write_text("[]")
    began = time.monotonic()
    hosts = ["answers", "refuses", "hangs", "chatty", "foreign", "nopython"]
    answers = ssh.probe_hosts(hosts, ssh.SshShell(2222, None), ["a b.json", "hf_secretvalue", "nothing"])
    assert time.monotonic() - began < 15
    found = answers["answers"]
    assert found["folder"] and found["versions"]["torch"] and found["code"] and list(found["files"]) == ["a b.json"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["port"] > 0
    assert "Connection refused" in answers["refuses"] and "`ssh refuses` fails" in answers["refuses"]
    assert "did not answer within 5 s" in answers["hangs"]
    assert "something else than asked for" in answers["chatty"]
    assert "something else than asked for" in answers["foreign"]  # a banner that is no UTF-8
    assert "cannot be run there" in answers["nopython"]
    words = ssh_program.read_text()
    assert "-p 2222" in words and "BatchMode=yes" in words and "hf_secretvalue" not in words


def test_how_a_user_came_to_this_machine_is_no_way_between_hosts(monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", "203.0.113.7 50000 198.51.100.1 22")
    assert ssh.probe_hosts(["localhost"], ssh.SshShell(None, None), [])["localhost"]["route"] == []


def test_options_of_ssh_that_no_shell_would_read_are_named(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-o 'ProxyJump=bastion")
    with pytest.raises(ConfigError, match="^PDSH_SSH_ARGS_APPEND=-o 'ProxyJump=bastion: No closing quotation"):
        ssh.SshShell(None, None).options()


def test_ssh_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it on this machine" in ssh.probe_hosts(["elsewhere"], ssh.SshShell(None, None), [])["elsewhere"]


@pytest.mark.parametrize(("name", "here"), [("localhost", True), (os.uname().nodename, True), ("no-such.host", False)])
def test_this_machine_is_known_by_its_names(name, here):
    assert ssh.is_here(name) is here


def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch):
    from finetune.distributed import host_probe

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
