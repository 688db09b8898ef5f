"""Hosts are asked over ssh, by a program that stands in for it."""

import os
import socket
import stat
import sys
import time

import pytest

from finetune.distributed import host_probe
from finetune.launcher import ssh


def test_a_gpu_tool_that_hangs_is_no_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(host_probe, "SECONDS_FOR_A_PROGRAM", 0.2)
    assert host_probe.count_gpus() == 0 and host_probe.gpu_facts() == []


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


def test_ssh_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install it on this machine" in ssh.probe_hosts(["elsewhere"], ssh.SshShell(None, None), [])["elsewhere"]


def test_a_port_is_taken_while_somebody_listens_there():
    port = host_probe.free_port()
    assert not host_probe.is_taken(port)
    with socket.create_server(("", port)):
        assert host_probe.is_taken(port)
    assert not host_probe.is_taken(port)
    assert host_probe.machine() == host_probe.machine() != ""
