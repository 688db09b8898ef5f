"""`finetune launch`: the `deepspeed` command, supervised.

    finetune launch --hostfile=hostfiles/two_hosts finetune/finetune.py --model_name_or_path M ...

Everything that `deepspeed` takes stands where it stands for `deepspeed`. Before anything starts, flags, hostfile and
hosts are checked. On each host runs the `deepspeed` command itself, with `--no_ssh`: no pdsh and no second shell stands
between, so that arguments arrive as they are, a host's end is seen at once, and the exit status is the true one.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.config import Arguments, parse
from finetune.diagnostics import FAILURE_FILE, Failure, find_first_failure, format_failure_page, write_failure
from finetune.distributed import host_probe, stop_requests
from finetune.launcher import (
    JOB_HOSTFILE,
    LauncherArgs,
    environment_of_ranks,
    parse_launcher_args,
    read_hostfile,
    redact,
    resolve_resources,
    ssh,
)
from finetune.launcher.local_session import HOSTFILE_HERE, HostReport, LocalSession
from finetune.utils.errors import ConfigError
from finetune.utils.proc import POLL_SECONDS

SECONDS_FOR_OTHER_HOSTS = 20.0  # the ranks' guards end a run in two or three
SECONDS_TO_END = 8.0
OUR_SCRIPT = Path(__file__).resolve().parent.parent / "finetune.py"
# What decides how many ranks run where; the rest of the command line is handed on as it is.
NOT_HANDED_ON = ("hostfile", "master_addr", "master_port", "ssh_port", "venv_script", "no_ssh_check", "launcher",
                 "launcher_args", "force_multi")  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Check, start, watch, say how it ended; leaves with the run's exit status.

    Raises:
        ConfigError: a flag, the hostfile, a host; nothing was started.
    """
    flags = parse_launcher_args(argv)
    slots = resolve_resources(flags)
    arguments = parse(flags.script_args) if is_ours(flags) else None
    words, environment = without_secrets(flags.script_args)
    environment["FINETUNE_LAUNCH_KEY"] = secrets.token_hex(16)
    if slots is not None:
        environment["FINETUNE_WORLD_SIZE"] = str(sum(map(len, slots.values())))
    signals: list[int] = []
    for number in stop_requests.SIGNALS:
        signal.signal(number, lambda heard, _: signals.append(heard))
    parts = start(flags, slots, words, environment)
    watch(parts, signals)
    reports = [part.conclude() for part in parts]
    expected = {host: len(ids) for host, ids in slots.items()} if slots else {}
    status, failure = outcome(reports, expected, ours=arguments is not None, signals=signals)
    if failure is not None:
        conclude(failure, arguments)
    sys.exit(status)


def is_ours(flags: LauncherArgs) -> bool:
    """Whether the script is the one that trains, which says when it is complete."""
    return flags.script == "finetune.train" if flags.module else Path(flags.script).resolve() == OUR_SCRIPT


def without_secrets(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The script's arguments without a token in them, which everyone on a host could read in `ps`; it travels as a
    variable."""
    kept, environment = [], {}
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        if name != "--hub_token":
            kept.append(word)
        else:
            environment["HF_TOKEN"] = value if given else next(rest, "")
    return kept, environment


def start(
    flags: LauncherArgs, slots: dict[str, list[int]] | None, words: list[str], environment: dict[str, str]
) -> list[Any]:
    """Start the `deepspeed` command on every host.

    Raises:
        ConfigError: a host is not as it has to be.
    """
    script = ["--module"] if flags.module else []
    script += [flags.script, *words]
    if slots is None or flags.no_ssh:
        port = flags.given.get("master_port") or host_probe.free_port()
        command = [*deepspeed(), *handed_on(flags, "hostfile", "master_addr"), f"--master_port={port}", *script]
        show(command)
        return [LocalSession(command, environment, hostfile=None, host=os.uname().nodename)]
    if flags.launcher.lower() != "pdsh" or flags.launcher_args:
        asked = f"--launcher_args {flags.launcher_args}" if flags.launcher_args else f"--launcher {flags.launcher}"
        raise ConfigError(
            f"{asked}: finetune launch reaches hosts over ssh by itself: leave the flag out, or "
            "use the deepspeed command, without supervision"
        )
    shell = ssh.SshShell(flags.ssh_port, flags.venv_script)
    address, port, interfaces = check_hosts(flags, slots, shell, words)
    environment = {**environment_of_ranks(), **environment}
    text = "".join(f"{host} slots={count}\n" for host, count in read_hostfile(flags.hostfile or JOB_HOSTFILE).items())
    print(f"launch: {len(slots)} hosts, {sum(map(len, slots.values()))} ranks, meeting at {address}:{port}", flush=True)
    parts = []
    for number, host in enumerate(slots):
        place = ["--no_ssh", f"--node_rank={number}", f"--master_addr={address}", f"--master_port={port}"]
        command = [*deepspeed(), HOSTFILE_HERE, *handed_on(flags), *place, *script]
        if number == 0:
            show(command)
        own = ssh.environment_of(environment, interfaces.get(host) if len(slots) > 1 else None)
        if ssh.is_here(host):
            kind = LocalSession if len(slots) == 1 else ssh.LocalHost
            parts.append(kind(command, own, hostfile=text, host=host))
        else:
            parts.append(ssh.RemoteSession(shell, command, own, hostfile=text, host=host))
    return parts


def show(command: Sequence[str]) -> None:
    """What is run, without what nobody should read."""
    print(f"launch: {shlex.join(redact(command[1:]))}", flush=True)


def check_hosts(
    flags: LauncherArgs, slots: dict[str, list[int]], shell: ssh.SshShell, words: list[str]
) -> tuple[str, int, dict[str, str]]:
    """Ask every host what it has; returns where the ranks are to meet, and each host's interface where it is known.

    Raises:
        ConfigError: every fault, by host.
    """
    given_port = flags.given.get("master_port")
    if flags.no_ssh_check and flags.master_addr and given_port:
        return flags.master_addr, given_port, {}
    hosts = list(slots)[:1] if flags.no_ssh_check else list(slots)
    answers = ssh.probe_hosts(hosts, shell, ssh.shared_words(words), {"wanted": given_port})
    ssh.compare_hosts(answers, slots)
    first = next(iter(answers.values()))
    if first["wanted_is_taken"]:
        raise ConfigError(
            f"{hosts[0]}: --master_port {given_port} is taken: leave the flag out, and a free one is found; or end "
            f"what listens there (`ss -ltnp | grep {given_port}` shows it)"
        )
    address, port = ssh.rendezvous_address(answers, address=flags.master_addr, port=given_port)
    return address, port, ssh.interfaces_between(answers)


def deepspeed() -> list[str]:
    """The `deepspeed` command of this interpreter."""
    script = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(script)] if script.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]


def handed_on(flags: LauncherArgs, *also: str) -> list[str]:
    """The user's own launcher flags, `also` some that are mostly kept back; and less talk than by default."""
    without = {*NOT_HANDED_ON, "module"} - {*also}
    return flags.typed(without=without) + ([] if flags.given.keys() & {"log_level", "quiet"} else ["--log_level=error"])


def watch(parts: list[Any], signals: list[int]) -> None:
    """Until all hosts are done; the first signal asks the ranks to save and leave, the second ends them."""
    heard, ended_at = 0, None
    while any(part.is_running() for part in parts):
        running = [part for part in parts if part.is_running()]
        if len(signals) > heard:
            heard += 1
            for part in running:
                part.ask_to_stop() if heard == 1 else part.end_now()
        if len(running) < len(parts):
            ended_at = ended_at or time.monotonic()
            waited = time.monotonic() - ended_at
            if waited > SECONDS_FOR_OTHER_HOSTS:
                for part in running:
                    part.end_now()
            if waited > SECONDS_FOR_OTHER_HOSTS + SECONDS_TO_END:
                for part in running:
                    part.cut()
        time.sleep(POLL_SECONDS)


def outcome(
    reports: Sequence[HostReport], expected: dict[str, int], *, ours: bool, signals: Sequence[int]
) -> tuple[int, Failure | None]:
    """The run's exit status and what failed, from how its hosts ended.

    A status of 0 is believed only where every rank of ours has come to its end: a `deepspeed` whose launcher was killed
    says 0, too.
    """
    if len(signals) > 1:
        return 128 + signals[1], None
    failures = [report.failure for report in reports if report.failure is not None]
    statuses = [report.status for report in reports]
    if failures:
        failure = find_first_failure(failures)
        if failure.kind in ("error", "exception") or failure.signal is not None:
            return failure.status, failure
        there = [report.status for report in reports if report.status and report.host == failure.host]
        status = next(iter([*there, *filter(None, statuses)]), 1)
        return status, replace(failure, status=status)
    bad = [report for report in reports if report.status not in (0, stop_requests.EXIT_STOPPED)]
    if bad:
        text = f"the deepspeed command on {bad[0].host} ended with status {bad[0].status}, and no rank said why"
        return bad[0].status, Failure(kind="launcher", host=bad[0].host, status=bad[0].status, error=text)
    if stop_requests.EXIT_STOPPED in statuses:
        return stop_requests.EXIT_STOPPED, None
    for report in reports if ours else ():
        complete = [status for status in report.statuses.values() if status == 0]
        if not complete or len(complete) < expected.get(report.host, 1):
            text = f"the run on {report.host} ended without being complete, although deepspeed says that all is well"
            return 1, Failure(kind="launcher", host=report.host, error=text)
    return 0, None


def conclude(failure: Failure, arguments: Arguments | None) -> None:
    """The summary, last; the record, where the run has a folder and could not leave one itself."""
    record = Path(arguments.training["output_dir"]).expanduser() / FAILURE_FILE if arguments else None
    if record and record.parent.is_dir() and failure.kind in ("launcher", "lost"):
        write_failure(record.parent, failure)  # it stays as it is where the run left one
    if failure.kind != "error" or failure.phase not in ("start", "data", "rendezvous"):
        where = str(record) if record and record.is_file() else ""
        page = format_failure_page(failure, colour=sys.stderr.isatty(), record=where)
        print(f"\n{page}", file=sys.stderr, flush=True)
