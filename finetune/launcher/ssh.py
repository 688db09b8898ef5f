"""Many hosts over ssh: ask each what it has, compare, run the `deepspeed` command on each."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from finetune.diagnostics import Failure
from finetune.distributed import host_probe
from finetune.launcher.local_session import REPORT, HostReport, LocalSession, agent
from finetune.utils.errors import ConfigError, format_faults
from finetune.utils.proc import ROOT, command_calling

SECONDS_TO_CONNECT = 5
SECONDS_FOR_A_PROBE = 12
SECONDS_FOR_ALL_BYTES = 600
LOST = 255  # ssh's own status
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class SshShell:
    """How other hosts are reached.

    Args:
        port: of their sshd; None: as ssh's own configuration says.
        venv_script: what a host sources before anything is run there.
    """

    def __init__(self, port: int | None, venv_script: str | None) -> None:
        self.port, self.venv_script = port, venv_script

    def options(self) -> list[str]:
        """Of ssh: no questions, a limit to connect, `PDSH_SSH_ARGS_APPEND`, the port."""
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SECONDS_TO_CONNECT}"]
        options += ["-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]
        options += _words_of("PDSH_SSH_ARGS_APPEND")
        if self.port is not None:
            options += ["-p", str(self.port)]
        return options

    def command(self, host: str, words: Sequence[str], *, sources: bool = True) -> list[str]:
        """The ssh command that runs `words` on a host, each arriving as it is; `sources`: after the venv's script."""
        first = f". {shlex.quote(self.venv_script)} && " if self.venv_script and sources else ""
        return ["ssh", *self.options(), host, f"{first}exec {shlex.join(words)}"]


def _words_of(variable: str) -> list[str]:
    given = os.environ.get(variable, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise ConfigError(f"{variable}={given}: {error}: write it as a shell would read it") from None


def is_here(host: str) -> bool:
    """Whether a name of the hostfile means this machine."""
    name = host.rpartition("@")[2]
    if name in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, *_, address in found:
        with socket.socket(family, socket.SOCK_STREAM) as probing:
            try:
                probing.bind((address[0], 0))
                return True
            except OSError:
                continue
    return False


def probe_hosts(
    hosts: Sequence[str], shell: SshShell, words: Sequence[str], more: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any] | str]:
    """Collect the facts of each host, or the reason why it did not answer; all hosts at once, in seconds.

    Args:
        words: of the command line, some of which name files.
        more: what else is asked, see `distributed.host_probe.collect_host_facts`.
    """
    order = {"folder": os.getcwd(), "code": str(ROOT / "finetune"), "words": list(words), **(more or {})}
    seconds = SECONDS_FOR_A_PROBE if not order.get("full") else SECONDS_FOR_ALL_BYTES
    return run_on_all_hosts({host: order for host in hosts}, shell, host_probe.collect_host_facts, seconds)


def run_on_all_hosts(
    orders: Mapping[str, Mapping[str, Any]], shell: SshShell, function: Callable[[dict], dict], seconds: float
) -> dict[str, dict[str, Any] | str]:
    """Run a function of `host_probe` on each host with its order: what it returned, or in words why there is no answer.

    Nothing of ours has to be there: the text of that file is sent to the host's Python.
    """
    source = Path(host_probe.__file__).read_text(encoding="utf-8")

    def one(host: str) -> dict[str, Any] | str:
        call = (
            f"\nimport json\nprint(json.dumps({function.__name__}(json.loads({json.dumps(dict(orders[host]))!r}))))\n"
        )
        began = time.time()
        answer = run_on_host(host, shell, [sys.executable, "-"], source + call, seconds)
        return answer if isinstance(answer, str) else {**answer, "asked": [began, time.time()]}

    with ThreadPoolExecutor(len(orders)) as pool:
        return dict(zip(orders, pool.map(one, orders), strict=True))


def run_on_host(host: str, shell: SshShell, command: Sequence[str], given: str, seconds: float) -> dict[str, Any] | str:
    """Run a Python program on a host with `given` as its input; the JSON of its last line, or in words why not."""
    here = is_here(host)
    words = list(command) if here else shell.command(host, command)
    environment = {**os.environ}
    if here:  # how the user came here says nothing of the way between hosts
        environment.pop("SSH_CONNECTION", None)
    try:
        done = subprocess.run(
            words, input=given, capture_output=True, timeout=seconds, env=environment,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"did not answer within {seconds:g} s: does `ssh {host} true` come back?"
    except OSError as error:
        return f"{words[0]}: {error.strerror}: install it on this machine"
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        where = f"`ssh {host}` fails" if done.returncode == LOST and not here else f"{command[0]} cannot be run there"
        return f"{where}: {said[-1]}"
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return f"answered with something else than asked for: {done.stdout[:80]!r} (does its shell print a banner?)"


def shared_words(words: Sequence[str]) -> list[str]:
    """Words that may name what every host must have alike: all values but those of folders that a run writes."""
    kept, skip = [], False
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--"):
            skip = name in ("--output_dir", "--data_cache_dir", "--logging_dir", "--resume_from_checkpoint")
            value = word.partition("=")[2]
            kept += [value] if value and not skip else []
        elif not skip:
            kept.append(word)
    return kept


def compare_hosts(answers: Mapping[str, dict[str, Any] | str], slots: Mapping[str, list[int]]) -> None:
    """Find what would go wrong later, or silently differ.

    Raises:
        ConfigError: every fault, by host.
    """
    faults = [f"{host}: {fault}" for host, fault in faults_of(answers, slots)]
    if faults:
        raise ConfigError(format_faults(faults, "fault") + "\nnothing was started" if len(faults) > 1 else faults[0])


def faults_of(answers: Mapping[str, dict[str, Any] | str], slots: Mapping[str, list[int]]) -> list[tuple[str, str]]:
    """(host, what is wrong there); a host that answered is compared with the first that did."""
    faults = [(host, answer) for host, answer in answers.items() if isinstance(answer, str)]
    facts = {host: answer for host, answer in answers.items() if not isinstance(answer, str)}
    first = next(iter(facts), "")
    for host, found in facts.items():
        faults += [(host, fault) for fault in _faults(found, len(slots[host]), facts[first], first)]
    return faults + _twice(facts)


def _twice(facts: Mapping[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Machines that stand in the hostfile under several names: their ranks would take the same devices."""
    names: dict[str, str] = {}
    faults = []
    for host, found in facts.items():
        machine = found.get("machine")
        if machine and names.setdefault(machine, host) != host:
            faults.append((host, f"is the same machine as {names[machine]}: one line with the slots of both"))
    return faults


def _faults(found: dict[str, Any], slots: int, first: dict[str, Any], name: str) -> list[str]:
    """What is wrong with one host, most of it compared with the first."""
    if not found["folder"]:
        return [f"has no folder {os.getcwd()}: the same clone must lie under the same path on every host"]
    faults = []
    if found["code"] is None:
        faults.append(f"has no {ROOT / 'finetune'}: the same clone must lie under the same path on every host")
    elif found["code"] != first["code"]:
        faults.append(f"its {ROOT / 'finetune'} differs from that on {name}: bring both to the same commit")
    if found["python"] != first["python"]:
        faults.append(f"Python {found['python']}, but {first['python']} on {name}")
    for library in sorted(found["versions"].keys() | first["versions"].keys()):
        here, there = (one["versions"].get(library, "not installed") for one in (found, first))
        if here != there:
            faults.append(f"{library} {here}, but {there} on {name}")
    if found["gpus"] and slots > found["gpus"]:
        faults.append(f"{slots} slots for {found['gpus']} GPUs: lower slots in the hostfile, or use --num_gpus")
    if bool(found["gpus"]) != bool(first["gpus"]):
        faults.append(f"{found['gpus']} GPUs, but {first['gpus']} on {name}")
    for word in sorted(found["files"].keys() | first["files"].keys()):
        here, there = (one["files"].get(word) for one in (found, first))
        if here != there:
            how = "is missing" if here is None else f"is there, but not on {name}" if there is None else "differs from"
            faults.append(f"{word} {how}" + (f" that on {name}" if here and there else ""))
    return faults


def rendezvous_address(
    answers: Mapping[str, dict[str, Any] | str], *, address: str = "", port: int | None = None
) -> tuple[str, int]:
    """Address and free port of the first host, as the others reach it; what the user has given counts.

    The way ssh came shows an address that works between two machines; the first word of `hostname -I`, which DeepSpeed
    takes, may be a container's bridge.

    Raises:
        ConfigError: the first host did not answer, or has no address but its loopback.
    """
    host, first = next(iter(answers.items()))
    if isinstance(first, str):
        raise ConfigError(f"{host}: {first}")
    port = port or first["port"]
    if address:
        return address, port
    others = [one for one in answers.values() if not isinstance(one, str) and one is not first]
    seen = [first["route"][1]] if len(first["route"]) == 2 else []
    if not seen:  # the first host is this one: as the others saw it come
        seen = [one["route"][0] for one in others if one["route"]]
    usable = [one for one in seen if not _is_loopback(one)]
    if usable:
        return usable[0], port
    if not others:
        return "127.0.0.1", port
    raise ConfigError(f"{host}: no address is known under which the other hosts reach it: give --master_addr")


def interfaces_between(answers: Mapping[str, dict[str, Any] | str]) -> dict[str, str]:
    """By host, the network interface that has the address under which the others know it, where that is known."""
    facts = {host: answer for host, answer in answers.items() if not isinstance(answer, str)}
    seen = {one["route"][0] for one in facts.values() if len(one["route"]) == 2}
    found = {}
    for host, one in facts.items():
        own = {one["route"][1]} if len(one["route"]) == 2 else seen  # where ssh came from is this machine
        names = [name for name, address in one["interfaces"].items() if address in own and not _is_loopback(address)]
        found |= {host: names[0]} if names else {}
    return found


def in_brackets(host: str) -> str:
    """A name or an address in front of a port or a path: one of IPv6 has colons of its own."""
    return f"[{host}]" if ":" in host else host


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def environment_of(environment: Mapping[str, str], interface: str | None) -> dict[str, str]:
    """Of a host's ranks: gloo is told the interface unless the user has, or it would announce what the host's own name
    resolves to: on Debian 127.0.1.1."""
    return {**({GLOO_INTERFACE: interface} if interface else {}), **environment}


class RemoteSession:
    """The `deepspeed` command on another host: a `Session` there, with an agent between."""

    def __init__(
        self,
        shell: SshShell,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        hostfile: str | None,
        host: str,
    ) -> None:
        self.host, self.report = host, None
        self.process = subprocess.Popen(
            shell.command(host, command_calling(agent)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        order = {"command": list(command), "environment": dict(environment), "hostfile": hostfile, "host": host}
        self._say(json.dumps({**order, "folder": os.getcwd()}))
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self.readers = [threading.Thread(target=self._pass_on, args=one, daemon=True) for one in streams]
        for reader in self.readers:
            reader.start()

    def is_running(self) -> bool:
        """Whether the command still runs there."""
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Tell the ranks there to save and leave."""
        self._say("stop")

    def end_now(self) -> None:
        """End the run there. The connection's end says the same, where a word does not arrive."""
        self._say("end")

    def conclude(self) -> HostReport:
        """How it ended, as told by the agent; a connection that ended without a report is a lost host."""
        self.process.wait()
        for reader in self.readers:
            reader.join(5)
        if self.report is not None:
            return self.report
        text = f"the connection to {self.host} ended (ssh: {self.process.returncode}) before the run there did"
        return HostReport(self.host, LOST, failure=Failure(kind="lost", host=self.host, hosts=[self.host], error=text))

    def cut(self) -> None:
        """Give up the connection."""
        self.process.kill()

    def _say(self, line: str) -> None:
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # it ends; `conclude` says how
            return

    def _pass_on(self, source: Any, target: TextIO) -> None:
        for raw in source:
            line = raw.decode(errors="replace").rstrip("\n")
            if line.startswith(REPORT):
                self.report = HostReport.from_json(line.removeprefix(REPORT))
            else:
                say_for(self.host, line, target)


_saying = threading.Lock()


def say_for(host: str, line: str, target: TextIO) -> None:
    """One line of a host's output, whole, with its name; a terminal that is gone must not hold up the run."""
    with _saying, suppress(OSError, ValueError):
        target.write(f"{host}: {line}\n")
        target.flush()


class LocalHost(LocalSession):
    """The same on this machine, as one host of several: its lines bear its name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
        for source, target in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
            threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: Any, target: TextIO) -> None:
        for raw in source:
            say_for(self.host, raw.decode(errors="replace").rstrip("\n"), target)
