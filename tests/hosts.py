"""Real hosts on one machine, for tests of what spans several: own network, name, process list and /dev/shm, own sshd.

    namespace ft-hosts-PID-switch     bridge br0 ──┬─ port0 ──── eth0 10.77.0.10, lo, sshd    ft-hosts-PID-node0
                                                   └─ port1 ──── eth0 10.77.0.11, lo, sshd    ft-hosts-PID-node1

The addresses exist only inside these namespaces. The file system is that of the machine, like the shared one of a
cluster. Keys are thrown away with their folder; neither ~/.ssh nor /etc/ssh is written, nor read by these ssh and sshd.
PID is that of the test run, so that what a killed run left behind is known by its name.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PREFIX = "ft-hosts-"
PROGRAMS = ("ip", "pdsh", "ssh", "ssh-keygen", "sshd", "unshare")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
LIMIT_SECONDS = 20
SSHD_CONFIG = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PermitUserRC no
"""
SSH_CONFIG = """\
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
BatchMode yes
"""


def require() -> None:
    """Skip the test, with the reason, where hosts cannot be made; where CI=true that is a failure."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def why_not() -> str | None:
    """What this machine lacks for hosts of its own, in one line; None where nothing is missing."""
    if os.geteuid() != 0:
        return "several hosts on one machine need root"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=SEARCHED)]
    if missing:
        return f"missing for several hosts: {', '.join(missing)} (apt-get install iproute2 openssh-server pdsh)"
    links = "{0} link add type bridge && {0} link add type veth".format(_program("ip"))
    try:
        _run(*UNSHARE, "--net", "sh", "-c", f"mount -t tmpfs tmpfs /run && {links}")
    except RuntimeError as error:
        return f"no namespaces for several hosts: {error}"
    return None


@dataclass(frozen=True)
class Host:
    """One host: its name, its address, the namespace that holds it."""

    name: str
    address: str
    namespace: str
    folder: Path  # keys, configurations and logs of all hosts
    own: set[int] = field(default_factory=set)  # ids of the processes of an idle host

    def command(self, words: Sequence[object], folder: Path) -> list[str]:
        """The command line that runs `words` in `folder` of this host, as its user does who logged in there."""
        ssh = ["ssh", "-F", str(self.folder / "ssh_config"), self.address]
        remote = f"cd {shlex.quote(str(folder))} && exec {shlex.join(map(str, words))}"
        return [_program("ip"), "netns", "exec", self.namespace, *ssh, remote]

    def processes(self) -> dict[int, str]:
        """What an idle host does not run: process id (of the machine) -> command line."""
        found = {}
        for number in _process_ids(self.namespace) - self.own:
            with suppress(OSError):  # it ended meanwhile
                found[number] = Path(f"/proc/{number}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
        return {number: line for number, line in found.items() if line}  # no line: ended, not yet waited for

    def end_processes(self) -> None:
        """End all that an idle host does not run."""
        _end(self.processes())


@contextmanager
def running(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts named node0, node1, ... that reach each other over ssh; `folder` (absolute) holds their files."""
    for name in _namespaces(PREFIX):
        if not Path("/proc", name.split("-")[2]).exists():
            with suppress(RuntimeError):  # another run removes it too
                _remove(name)
    prefix = f"{PREFIX}{os.getpid()}-"
    hosts = [Host(f"node{n}", f"10.77.0.{10 + n}", f"{prefix}node{n}", folder) for n in range(count)]
    daemons: list[subprocess.Popen] = []
    try:
        _write_files(hosts, folder)
        _connect(hosts, f"{prefix}switch")
        daemons += map(_boot, hosts)
        for host in hosts:
            _wait_for_ssh(host)
        yield hosts
    finally:
        for name in _namespaces(prefix):
            _remove(name)
        for daemon in daemons:  # it is dead: only its exit status is left
            daemon.wait()


def _write_files(hosts: list[Host], folder: Path) -> None:
    """Throw-away keys, one configuration for every ssh, one for every sshd, one /etc/hosts."""
    for name in ("host", "user"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    (folder / "known_hosts").write_text("node*,10.77.0.* " + (folder / "host.pub").read_text())
    (folder / "names").write_text("127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))


def _connect(hosts: list[Host], switch: str) -> None:
    """A namespace per host, with an eth0 that leads to a bridge in a namespace of its own."""
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "br0", "up", "type", "bridge")
    for number, host in enumerate(hosts):
        peer = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _run("ip", "netns", "add", host.namespace)
        _run("ip", "-n", switch, "link", "add", f"port{number}", "master", "br0", "up", *peer)
        _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _run("ip", "-n", host.namespace, "link", "set", device, "up")


def _boot(host: Host) -> subprocess.Popen:
    """Start the host: sshd is process 1 of its process list and needs a /run/sshd."""
    names, configuration = (shlex.quote(str(host.folder / name)) for name in ("names", "sshd_config"))
    script = (
        f"hostname {host.name} && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/sshd && "
        f"mount --bind {names} /etc/hosts && exec {_program('sshd')} -D -e -f {configuration}"
    )
    words = [_program("ip"), "netns", "exec", host.namespace, *UNSHARE, "sh", "-c", script]
    with open(host.folder / f"{host.name}.log", "w") as log:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _wait_for_ssh(host: Host) -> None:
    """Return once the host answers and has noted what it runs while idle."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while (done := subprocess.run(host.command(["true"], Path("/")), capture_output=True, text=True)).returncode:
        if time.monotonic() > deadline:
            log = (host.folder / f"{host.name}.log").read_text()
            raise RuntimeError(f"{host.name} does not answer: {done.stderr}{log}")
        time.sleep(0.1)
    while len(idle := _process_ids(host.namespace)) > 2 and time.monotonic() < deadline:
        time.sleep(0.05)  # unshare and sshd stay, the session of the question goes
    host.own.update(idle)


def _remove(namespace: str) -> None:
    """End every process of a namespace, then the namespace; its ends of cables go with it."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while (numbers := _process_ids(namespace)) and time.monotonic() < deadline:
        _end(numbers)
    _run("ip", "netns", "delete", namespace)


def _namespaces(prefix: str) -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(prefix)]


def _process_ids(namespace: str) -> set[int]:
    return {int(word) for word in _run("ip", "netns", "pids", namespace).split()}


def _end(numbers: Iterable[int]) -> None:
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _program(name: str) -> str:
    return shutil.which(name, path=SEARCHED) or name


def _run(program: str, *words: object) -> str:
    done = subprocess.run([_program(program), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} {shlex.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout
