"""Many hosts over ssh: collect the facts of each, compare them, run the `deepspeed` command on each."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from finetune.diagnostics import Failure
from finetune.distributed import host_probe
from finetune.distributed.watchdog.transport import is_loopback
from finetune.launcher.local_session import REPORT_PREFIX, SECONDS_TO_FORWARD, HostReport, forward_output, run_agent
from finetune.utils.errors import ConfigError, format_faults, lines_of
from finetune.utils.proc import ROOT, command_calling

SECONDS_TO_CONNECT = 5
SECONDS_TO_PROBE = 12
SECONDS_TO_PROBE_ALL_BYTES = 600
LOST = 255  # ssh's own exit status
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
UNSHARED_FLAGS = ("--output_dir", "--data_cache_dir", "--logging_dir", "--resume_from_checkpoint")
Facts = dict[str, Any]
Answers = Mapping[str, Facts | str]  # host -> its facts, or why there are none


class SshShell:
    """How other hosts are reached: at a port (None: ssh's own), and what is sourced there before a command."""

    def __init__(self, port: int | None, venv_script: str | None) -> None:
        self.port, self.venv_script = port, venv_script

    def options(self) -> list[str]:
        """Return ssh's options: `PDSH_SSH_ARGS_APPEND` first, which ssh prefers; no prompts, time limits, the port."""
        given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
        try:
            options = shlex.split(given)
        except ValueError as error:
            raise ConfigError(f"PDSH_SSH_ARGS_APPEND={given}: {error}: write it as a shell would read it") from None
        options += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS_TO_CONNECT}"]
        options += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
        return options + (["-p", str(self.port)] if self.port is not None else [])

    def extra_seconds(self) -> float:
        """Return by how much the user's own `ConnectTimeout` is longer."""
        timeout = re.search(r"ConnectTimeout[ =](\d+)", " ".join(self.options()), re.IGNORECASE)
        return max(0, int(timeout[1]) - SECONDS_TO_CONNECT) if timeout else 0

    def command(self, host: str, words: Sequence[str], *, with_venv: bool = True) -> list[str]:
        """Return the ssh command that runs `words` on a host, each word unchanged, after the venv's script."""
        setup = f". {shlex.quote(self.venv_script)} && " if self.venv_script and with_venv else ""
        return ["ssh", *self.options(), host, f"{setup}exec {shlex.join(words)}"]


def is_here(host: str) -> bool:
    """Return whether a name of the hostfile means this machine."""
    name = host.rpartition("@")[2]
    if name in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        addresses = {str(address[0]) for *_, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    interfaces = psutil.net_if_addrs().values()
    own = {address.address.partition("%")[0] for interface in interfaces for address in interface}
    return any(is_loopback(address) or address in own for address in addresses)


def probe_hosts(
    hosts: Sequence[str], shell: SshShell, words: Sequence[str], more: Mapping[str, Any] | None = None
) -> dict[str, Facts | str]:
    """Collect the facts of each host, or the reason why it did not answer; all hosts at once, in seconds.

    `words` of the command line may name files; `more` are entries for `distributed.host_probe.collect_host_facts`.
    """
    order = {"folder": os.getcwd(), "code": str(ROOT / "finetune"), "words": list(words), **(more or {})}
    seconds = SECONDS_TO_PROBE_ALL_BYTES if order.get("full") else SECONDS_TO_PROBE
    return run_on_all_hosts({host: order for host in hosts}, shell, host_probe.collect_host_facts, seconds)


def run_on_all_hosts(
    orders: Mapping[str, Mapping[str, Any]], shell: SshShell, function: Callable[[dict], dict], seconds: float
) -> dict[str, Facts | str]:
    """Run a function of `host_probe` on each host with its order; return its results, or why there is none.

    Nothing of ours has to be installed there: the text of that file is sent to the host's Python.
    """
    source = Path(host_probe.__file__).read_text(encoding="utf-8")
    call = "\nimport json\nprint(json.dumps({}(json.loads({!r}))))\n"
    texts = {host: source + call.format(function.__name__, json.dumps(dict(order))) for host, order in orders.items()}
    return run_program_on_hosts(texts, shell, [sys.executable, "-"], seconds, timed=True)


def run_program_on_hosts(
    inputs: Mapping[str, str], shell: SshShell | None, command: Sequence[str], seconds: float, *, timed: bool = False
) -> dict[str, Any]:
    """Run a Python program on all hosts at once, with an input for each on stdin; without a shell, on this machine.

    Returns the JSON of its last line by host, or why there is none; if `timed` with `asked`, the times around the call.
    """

    def run(host: str) -> Any:
        began = time.time()
        answer = _run_on_host(host, shell, command, inputs[host], seconds)
        return {**answer, "asked": [began, time.time()]} if timed and not isinstance(answer, str) else answer

    with ThreadPoolExecutor(len(inputs)) as pool:
        return dict(zip(inputs, pool.map(run, inputs), strict=True))


def _run_on_host(host: str, shell: SshShell | None, command: Sequence[str], text: str, seconds: float) -> Any | str:
    here = shell is None or is_here(host)
    words = list(command) if shell is None or here else shell.command(host, command)
    environment = {**os.environ}
    if shell is not None and not here:
        seconds += shell.extra_seconds()
    if here:  # how the user came to this machine is no route between hosts
        environment.pop("SSH_CONNECTION", None)
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, timeout=seconds, env=environment,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return (
            f"did not answer within {seconds:g} s: does `ssh {host} true` come back? If it is slow, give it more time "
            "(PDSH_SSH_ARGS_APPEND='-o ConnectTimeout=60'); if it stands still, the MTU of an interface may be larger "
            f"than that of the way (`ping -M do -s 1472 {host}`)"
        )
    except OSError as error:
        return f"{words[0]}: {error.strerror}: install it on this machine"
    if done.returncode:
        what = f"`ssh {host}` fails" if done.returncode == LOST and not here else f"{command[0]} cannot be run there"
        return f"{what}: {lines_of(done.stderr)[-1]}"
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return f"answered with something else than asked for: {done.stdout[:80]!r} (does its shell print a banner?)"


def shared_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line that may name files that all hosts need: not those that a run writes."""
    values, is_shared = [], True
    for word in words:
        name, _, value = word.partition("=")
        if not word.startswith("--"):
            value = word
        else:
            is_shared = name not in UNSHARED_FLAGS
        if value and is_shared:
            values.append(value)
    return values


def compare_hosts(answers: Answers, slots: Mapping[str, Sequence[int]]) -> None:
    """Raise `ConfigError` for hosts that cannot run together, or would silently differ; it names every fault."""
    faults = [f"{host}: {fault}" for host, fault in faults_of(answers, slots)]
    if faults:
        raise ConfigError(format_faults(faults, "fault") + "\nnothing was started" if len(faults) > 1 else faults[0])


def faults_of(answers: Answers, slots: Mapping[str, Sequence[int]]) -> list[tuple[str, str]]:
    """Return (host, fault); a host that answered is compared with the first that did."""
    faults = [(host, answer) for host, answer in answers.items() if isinstance(answer, str)]
    facts = _facts_of(answers)
    reference = next(iter(facts), "")
    machines: dict[str, str] = {}
    for host, own in facts.items():
        faults += [(host, fault) for fault in _differences(own, len(slots[host]), facts[reference], reference)]
        machine = own.get("machine")
        if machine and machines.setdefault(machine, host) != host:  # their ranks would use the same devices
            faults.append((host, f"is the same machine as {machines[machine]}: one line with the slots of both"))
    return faults


def _facts_of(answers: Answers) -> dict[str, Facts]:
    return {host: answer for host, answer in answers.items() if not isinstance(answer, str)}


def _differences(facts: Facts, slots: int, reference: Facts, name: str) -> list[str]:
    """The faults of one host, most of them differences from the first host, `name`."""
    code = ROOT / "finetune"
    if not facts["folder"]:
        return [f"has no folder {os.getcwd()}: the same clone must lie under the same path on every host"]
    faults = []
    if facts["code"] is None:
        faults.append(f"has no {code}: the same clone must lie under the same path on every host")
    elif facts["code"] != reference["code"]:
        faults.append(f"its {code} differs from that on {name}: bring both to the same commit")
    if facts["python"] != reference["python"]:
        faults.append(f"Python {facts['python']}, but {reference['python']} on {name}")
    for library in sorted(facts["versions"].keys() | reference["versions"].keys()):
        own, other = (versions.get(library, "not installed") for versions in (facts["versions"], reference["versions"]))
        if own != other:
            faults.append(f"{library} {own}, but {other} on {name}")
    if facts["gpus"] and slots > facts["gpus"]:
        faults.append(f"{slots} slots for {facts['gpus']} GPUs: lower slots in the hostfile, or use --num_gpus")
    if bool(facts["gpus"]) != bool(reference["gpus"]):
        faults.append(f"{facts['gpus']} GPUs, but {reference['gpus']} on {name}")
    for word in sorted(facts["files"].keys() | reference["files"].keys()):
        own, other = facts["files"].get(word), reference["files"].get(word)
        if own is None:
            faults.append(f"{word} is missing")
        elif other is None:
            faults.append(f"{word} is there, but not on {name}")
        elif own != other:
            faults.append(f"{word} differs from that on {name}")
    return faults


def rendezvous_address(answers: Answers, *, address: str = "", port: int | None = None) -> tuple[str, int]:
    """Return address and free port of the first host, as the others reach it; what the user has given is kept.

    The route of the ssh connection shows an address that works between two machines. DeepSpeed takes the first word of
    `hostname -I`, which may be the bridge of a container.
    """
    host, first = next(iter(answers.items()))
    if isinstance(first, str):
        raise ConfigError(f"{host}: {first}")
    port = port or first["port"]
    if address:
        return address, port
    others = [facts for facts in _facts_of(answers).values() if facts is not first]
    addresses = [first["route"][1]] if len(first["route"]) == 2 else []
    if not addresses:  # the first host is this one: as the others saw it connect
        addresses = [facts["route"][0] for facts in others if facts["route"]]
    usable = [candidate for candidate in addresses if not is_loopback(candidate)]
    if usable:
        return usable[0], port
    if not others:
        return "127.0.0.1", port
    raise ConfigError(f"{host}: no address is known under which the other hosts reach it: give --master_addr")


def interfaces_between(answers: Answers) -> dict[str, str]:
    """Return host -> the network interface with the address that the other hosts use, where that is known."""
    facts = _facts_of(answers)
    of_this_machine = {own["route"][0] for own in facts.values() if len(own["route"]) == 2}  # where ssh came from
    names: dict[str, str] = {}
    for host, own in facts.items():
        known = {own["route"][1]} if len(own["route"]) == 2 else of_this_machine
        for name, addresses in own["interfaces"].items():
            if any(address in known and not is_loopback(address) for address in addresses):
                names.setdefault(host, name)
    return names


def in_brackets(host: str) -> str:
    """Return a name or address as it stands before a port or a path: IPv6 addresses have colons of their own."""
    return f"[{host}]" if ":" in host else host


def add_interface(environment: Mapping[str, str], interface: str | None) -> dict[str, str]:
    """Add gloo's interface to a host's variables, unless the user has set it.

    Otherwise gloo announces the address of the host's own name, which on Debian is 127.0.1.1.
    """
    return {**({GLOO_INTERFACE: interface} if interface else {}), **environment}


class RemoteSession:
    """The `deepspeed` command on another host: a `LocalSession` there, behind an agent and an ssh connection."""

    def __init__(
        self,
        shell: SshShell,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        hostfile: str | None,
        host: str,
    ) -> None:
        self.host = host
        self.report: HostReport | None = None
        self.process = subprocess.Popen(
            shell.command(host, command_calling(run_agent)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        order = {"command": list(command), "environment": dict(environment), "hostfile": hostfile, "host": host}
        self._send(json.dumps({**order, "folder": os.getcwd()}))
        self.forwarders = forward_output(host, self.process, self._take_report)

    def is_running(self) -> bool:
        """Return whether the command still runs there."""
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Ask the ranks there to save and exit."""
        self._send("stop")

    def kill(self) -> None:
        """End the run there; if the word does not arrive, the end of the connection does the same."""
        self._send("end")

    def disconnect(self) -> None:
        """Close the connection."""
        self.process.kill()

    def finish(self) -> HostReport:
        """Return the agent's report; a connection that ended without one is a lost host."""
        self.process.wait()
        for forwarder in self.forwarders:
            forwarder.join(SECONDS_TO_FORWARD)
        if self.report is not None:
            return self.report
        text = f"the connection to {self.host} ended (ssh: {self.process.returncode}) before the run there did"
        return HostReport(self.host, LOST, failure=Failure(kind="lost", host=self.host, hosts=(self.host,), error=text))

    def _send(self, line: str) -> None:
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # the connection has ended; `finish` reports it
            return

    def _take_report(self, line: str) -> bool:
        if not line.startswith(REPORT_PREFIX):
            return False
        self.report = HostReport.from_json(line.removeprefix(REPORT_PREFIX))
        return True
