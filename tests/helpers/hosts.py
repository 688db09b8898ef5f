"""Real hosts on one machine, for tests of what spans several: own network, name, process list and /dev/shm, own sshd.

    namespace ft-hosts-PID-switch     bridge br0 ──┬─ port0 ──── eth0 10.77.0.10, lo, sshd    ft-hosts-PID-node0
                                                   └─ port1 ──── eth0 10.77.0.11, lo, sshd    ft-hosts-PID-node1

The addresses exist only inside these namespaces. The file system is that of the machine, like the shared one of a
cluster; what `Host.bound` and `Host.disk` put over it is seen by that host alone. A host can lose its network, its sshd
and its life, and stand still. Keys are thrown away with their folder; neither ~/.ssh nor /etc/ssh is written, nor read
by these ssh and sshd. PID is that of the test run, so that what a killed run left behind is known by its name; several
clusters of one run have a number there (PID-2-node0).
"""

import itertools
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
PROGRAMS = ("ip", "nsenter", "pdsh", "rsync", "ssh", "ssh-keygen", "sshd", "unshare")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc")
LIMIT_SECONDS = 20
ALIAS = "-alias"  # behind a host's name: another name for it
LISTENING = "Server listening on"
_numbers = itertools.count(1)
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
        return f"missing for several hosts: {', '.join(missing)} (apt-get install iproute2 openssh-server pdsh rsync)"
    links = "{0} link add type bridge && {0} link add type veth".format(_program("ip"))
    try:
        _run(*UNSHARE, "--net", "sh", "-c", f"mount -t tmpfs tmpfs /run && {links}")
    except RuntimeError as error:
        return f"no namespaces for several hosts: {error}"
    return None


@dataclass(frozen=True)
class Host:
    """One host: name, address, the namespace that holds it; and what can happen to it, until a block is left."""

    name: str
    address: str
    namespace: str
    folder: Path  # keys, configurations and logs of all hosts
    own: set[int] = field(default_factory=set)  # ids of the processes of an idle host
    daemons: list[subprocess.Popen] = field(default_factory=list)  # one for each time it was booted

    def command(self, words: Sequence[object], folder: Path) -> list[str]:
        """The command line that runs `words` in `folder` of this host, as its user does who logged in there."""
        ssh = ["ssh", "-F", str(self.folder / "ssh_config"), self.address]
        remote = f"cd {shlex.quote(str(folder))} && exec {shlex.join(map(str, words))}"
        return [_program("ip"), "netns", "exec", self.namespace, *ssh, remote]

    def run(self, *words: object) -> str:
        """What `words` say on this host, typed at its own console: no network and no sshd is needed."""
        return _run("nsenter", "--target", self._first(), "--mount", "--uts", "--net", "--pid", *words)

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
    def bound(self, source: Path, target: Path) -> Iterator[None]:
        """On this host alone `target` is what `source` is: both files, or both folders."""
        with self._mounted(target, "--bind", source):
            yield

    @contextmanager
    def disk(self, folder: Path, size: str = "64m") -> Iterator[None]:
        """On this host alone `folder` is an empty disk of its own; larger with `resize`."""
        with self._mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
            yield

    def resize(self, folder: Path, size: str) -> None:
        """Give a `disk` another size; what lies there stays."""
        self.run("mount", "-o", f"remount,size={size}", folder)

    @contextmanager
    def sshd(self, *lines: str) -> Iterator[None]:
        """Its sshd has these lines in front of its configuration; sessions that are open stay.

        With `Port 2` nobody listens where hosts are expected to.
        """
        self._configure_sshd(*lines)
        try:
            yield
        finally:
            self._configure_sshd()

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """No packet comes in or goes out."""
        _run("ip", "-n", self.namespace, "link", "set", "eth0", "down")
        try:
            yield
        finally:
            _run("ip", "-n", self.namespace, "link", "set", "eth0", "up")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Everything stands still there."""
        stopped = _process_ids(self.namespace)
        _signal(stopped, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(stopped, signal.SIGCONT)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Every process ends in one instant, sshd too, and the others' connections are reset; then the host boots."""
        os.kill(self._first(), signal.SIGKILL)
        self.daemons[-1].wait(LIMIT_SECONDS)
        try:
            yield
        finally:
            boot(self)
            _wait_for_ssh(self)

    def _first(self) -> int:
        """The process that is number 1 in the host's own list."""
        for number in _process_ids(self.namespace):
            with suppress(OSError):
                words = Path(f"/proc/{number}/status").read_text().partition("NSpid:")[2].splitlines()[0].split()
                if len(words) > 1 and words[-1] == "1":
                    return number
        raise RuntimeError(f"{self.name} does not run")

    @contextmanager
    def _mounted(self, target: Path, *words: object) -> Iterator[None]:
        boots = len(self.daemons)
        self.run("mount", *words, target)
        try:
            yield
        finally:
            if len(self.daemons) == boots:  # else it was off meanwhile, and forgot
                self.run("umount", "--lazy", target)

    def _configure_sshd(self, *lines: str) -> None:
        text = SSHD_CONFIG.format(folder=self.folder)
        (self.folder / f"sshd_config.{self.name}").write_text("\n".join([*lines, text]))
        log = self.folder / f"{self.name}.log"
        if not self.daemons:
            return
        before, deadline = log.read_text().count(LISTENING), time.monotonic() + LIMIT_SECONDS
        os.kill(self._first(), signal.SIGHUP)  # it reads its configuration again
        while log.read_text().count(LISTENING) == before and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def running(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts named node0, node1, ... that reach each other over ssh; `folder` (absolute) holds their files."""
    for name in _namespaces(PREFIX):
        if not Path("/proc", name.split("-")[2]).exists():
            with suppress(RuntimeError):  # another run removes it too
                _remove(name)
    prefix = f"{PREFIX}{os.getpid()}-{next(_numbers)}-"
    hosts = [Host(f"node{n}", f"10.77.0.{10 + n}", f"{prefix}node{n}", folder) for n in range(count)]
    try:
        _write_files(hosts, folder)
        _connect(hosts, f"{prefix}switch")
        for host in hosts:
            boot(host)
        for host in hosts:
            _wait_for_ssh(host)
        yield hosts
    finally:
        for name in _namespaces(prefix):
            _remove(name)
        for daemon in itertools.chain.from_iterable(host.daemons for host in hosts):  # dead: its exit status is left
            daemon.wait()


def _write_files(hosts: list[Host], folder: Path) -> None:
    """Throw-away keys, one configuration for every ssh, one for every sshd, one /etc/hosts."""
    for name in ("host", "user"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    (folder / "known_hosts").write_text("node*,10.77.0.* " + (folder / "host.pub").read_text())
    names = [f"{host.address} {host.name} {host.name}{ALIAS}\n" for host in hosts]
    (folder / "names").write_text("127.0.0.1 localhost\n" + "".join(names))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    for host in hosts:
        host._configure_sshd()


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


def boot(host: Host) -> None:
    """Start the host: sshd is process 1 of its process list and needs a /run/sshd."""
    names, configuration = (shlex.quote(str(host.folder / name)) for name in ("names", f"sshd_config.{host.name}"))
    script = (
        f"hostname {host.name} && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir /run/sshd && "
        f"mount --bind {names} /etc/hosts && exec {_program('sshd')} -D -e -f {configuration}"
    )
    words = [_program("ip"), "netns", "exec", host.namespace, *UNSHARE, "sh", "-c", script]
    host.own.clear()
    with open(host.folder / f"{host.name}.log", "w") as log:
        host.daemons.append(
            subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        )


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
    _signal(numbers, signal.SIGKILL)


def _signal(numbers: Iterable[int], which: signal.Signals) -> None:
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, which)


def _program(name: str) -> str:
    return shutil.which(name, path=SEARCHED) or name


def _run(program: str, *words: object) -> str:
    done = subprocess.run([_program(program), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} {shlex.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout
