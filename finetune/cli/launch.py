"""`finetune launch`: the `deepspeed` command, supervised, for any script; `finetune train` is the same for ours.

    finetune launch --hostfile=hostfiles/two_hosts my_script.py ...

The arguments are those of `deepspeed`. Flags, hostfile and hosts are checked before anything starts.
The `deepspeed` command itself runs on each host, with `--no_ssh`: without pdsh and a second shell between, arguments
arrive unchanged, the loss of a host is seen at once, and the exit status is the true one.
"""

import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NoReturn

from finetune.config import Arguments, as_flags, build_parser, parse
from finetune.diagnostics import FAILURE_FILE, Failure, find_first_failure, format_failure_page, write_failure
from finetune.distributed import host_probe, stop_requests
from finetune.launcher import (
    LauncherArgs,
    Resources,
    environment_of_ranks,
    local_slots,
    parse_launcher_args,
    redact,
    restarts,
    ssh,
)
from finetune.launcher.local_session import HOSTFILE_PLACEHOLDER, HostReport, LocalSession
from finetune.training.start_checks import PlannedRanks, check_start
from finetune.utils.errors import ConfigError, StorageError, missing_reason
from finetune.utils.options import source_folder
from finetune.utils.proc import POLL_SECONDS

SECONDS_FOR_OTHER_HOSTS = 20.0  # the ranks' watchdogs end a run in two or three
SECONDS_TO_KILL = 8.0
HostSession = LocalSession | ssh.RemoteSession
OUR_SCRIPT = Path(__file__).resolve().parent.parent / "finetune.py"
HOST_FILTERS = {"include", "exclude"}
PORT_TAKEN = ("--master_port {0} is taken: leave the flag out, and a free port is found; or end what listens there "
              "(`ss -ltnp | grep {0}` shows it)")  # fmt: skip
# Flags that `finetune launch` itself acts on; all others are passed to `deepspeed`.
NOT_PASSED_ON = ("hostfile", "master_addr", "master_port", "ssh_port", "venv_script", "no_ssh_check", "launcher",
                 "launcher_args", "force_multi", "max_restarts", "num_nodes")  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Check the command and the hosts, run the script, exit with its status."""
    supervise(parse_launcher_args(argv, supervised=True))


def supervise(flags: LauncherArgs) -> NoReturn:
    """Check the command and the hosts, run the script, exit with its status."""
    resources = restarts.resources_of_first_start(flags)
    if resources is not None and resources.spares:  # its hosts are what the filters have left
        flags = replace(flags, given={name: flags.given[name] for name in flags.given.keys() - HOST_FILTERS})
    arguments = parse(flags.script_args) if is_ours(flags) else None
    starts_here = resources is None or ssh.is_here(resources.first_host)
    if starts_here and not flags.module and not Path(flags.script).is_file():
        raise ConfigError(f"SCRIPT {flags.script}: {missing_reason(Path(flags.script))}")
    if starts_here and flags.module and not PathFinder.find_spec(flags.script.partition(".")[0], ["", *sys.path]):
        raise ConfigError(f"--module {flags.script}: there is no such module here, nor in {sys.prefix}")
    for library in ("torch", *(("accelerate", "datasets", "peft") if arguments else ())):
        source_folder(library)  # an error if it is not installed: not by every rank
    if arguments:
        use_cpu = bool(arguments.given("use_cpu"))
        if starts_here:
            check_start(arguments, PlannedRanks.of_launch(flags, resources, use_cpu=use_cpu), is_launch=True)
    words = as_flags(flags.script_args, build_parser().types) if arguments else flags.script_args
    words, environment = without_secrets(words)
    signals: list[int] = []
    for number in stop_requests.SIGNALS:
        signal.signal(number, lambda received, _: signals.append(received))
    max_restarts = flags.given.get("max_restarts", 0)
    for restart in range(max_restarts + 1):
        status, failure = run_once(flags, resources, words, environment, signals, arguments, restart)
        output_dir = Path(arguments.training["output_dir"]).expanduser() if arguments else Path("/")
        cause = None if signals else restarts.cause_of(status, failure, output_dir)
        if failure is not None:
            report_failure(failure, arguments)
        if cause is None or arguments is None or restart == max_restarts:
            break
        resources = choose_hosts(resources, failure, may_shrink=arguments.run.resume_world_size == "any")
        words, environment = restarts.resuming(words), {**environment, **restarts.variables(cause)}
        wait(restarts.seconds_to_wait(restart), f"restart {restart + 1} of {max_restarts}: {cause}", signals)
        if signals:
            sys.exit(stop_requests.EXIT_STOPPED)
    sys.exit(status)


def run_once(
    flags: LauncherArgs, resources: Resources | None, words: list[str], environment: dict[str, str],
    signals: list[int], arguments: Arguments | None, restart: int,
) -> tuple[int, Failure | None]:  # fmt: skip
    """Start the run, supervise it to its end, and return its status and its failure, if any."""
    environment = {**environment, "FINETUNE_LAUNCH_KEY": secrets.token_hex(16)}
    if resources is not None:
        environment["FINETUNE_WORLD_SIZE"] = str(resources.world_size)
    try:
        sessions = start(flags, resources, words, environment)
    except ConfigError as error:
        if not restart:
            raise
        hosts = tuple(resources.slots) if resources else ()
        return 1, Failure("missing", f"hosts are not ready: {error}", hosts=hosts)
    watch(sessions, signals)
    reports = [session.finish() for session in sessions]
    expected = {host: len(ids) for host, ids in resources.slots.items()} if resources else {}
    return outcome(reports, expected, ours=arguments is not None, signals=signals)


def choose_hosts(resources: Resources | None, failure: Failure | None, *, may_shrink: bool) -> Resources | None:
    """Return the resources of the next start: without the host that failed, if it can be replaced or left out."""
    host = restarts.failed_host(failure, resources) if resources else None
    if resources is None or host is None:
        return resources
    chosen = restarts.without_host(resources, host, may_shrink=may_shrink)
    added = [name for name in chosen.slots if name not in resources.slots]
    if chosen is not resources:
        print(f"launch: without {host}" + (f", with the spare {added[0]}" if added else ""), flush=True)
    return chosen


def wait(seconds: float, why: str, signals: list[int]) -> None:
    """Wait before a restart; a signal ends the wait."""
    print(f"launch: {why}: starting from the newest checkpoint in {seconds:.0f} s", flush=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not signals:
        time.sleep(POLL_SECONDS)


def is_ours(flags: LauncherArgs) -> bool:
    """Return whether the script is the one of this package, which reports that it is complete."""
    return flags.script == "finetune.train" if flags.module else Path(flags.script).resolve() == OUR_SCRIPT


def without_secrets(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split a token from the script's arguments, which every user of a host can read in `ps`, into a variable."""
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
    flags: LauncherArgs, resources: Resources | None, words: list[str], environment: dict[str, str]
) -> list[HostSession]:
    """Start the `deepspeed` command on every host; a `ConfigError` names hosts that cannot be reached, or differ."""
    script = [*(["--module"] if flags.module else []), flags.script, *words]
    if resources is None or flags.no_ssh:
        port = flags.given.get("master_port") or host_probe.free_port()
        if flags.node_rank <= 0 and host_probe.is_taken(port):
            raise ConfigError(PORT_TAKEN.format(port))
        kept = passed_on(flags, "hostfile", "master_addr")
        command = [*deepspeed(), *kept, f"--master_port={port}", *script]
        gpus = host_probe.count_gpus()
        if resources is None:
            local_slots(flags, gpus)
        show(command)
        has_none = not gpus and not host_probe.has_unlisted_gpus()
        if has_none:  # else DeepSpeed warns, in each of its processes, that it found none
            environment = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), **environment}
        if has_none or os.environ.get("CUDA_VISIBLE_DEVICES") == "-1":  # DeepSpeed would look for those numbers
            environment = {**environment, "CUDA_VISIBLE_DEVICES": ""}
        return [LocalSession(command, environment, hostfile=None, host=os.uname().nodename)]
    if flags.launcher.lower() != "pdsh" or flags.launcher_args:
        given = f"--launcher_args {flags.launcher_args}" if flags.launcher_args else f"--launcher {flags.launcher}"
        raise ConfigError(
            f"{given}: this command reaches hosts over ssh by itself: leave the flag out, or "
            "use the deepspeed command, without supervision"
        )
    shell = ssh.SshShell(flags.ssh_port, flags.venv_script)
    address, port, interfaces = check_hosts(flags, resources, shell, words)
    environment = {**environment_of_ranks(), **environment}
    is_alone = len(resources.slots) == 1
    print(
        f"launch: {len(resources.slots)} hosts, {resources.world_size} ranks, rendezvous at {address}:{port}",
        flush=True,
    )
    sessions: list[HostSession] = []
    for number, host in enumerate(resources.slots):
        node = ["--no_ssh", f"--node_rank={number}", f"--master_addr={address}", f"--master_port={port}"]
        command = [*deepspeed(), HOSTFILE_PLACEHOLDER, *passed_on(flags), *node, *script]
        if number == 0:
            show(command)
        variables = ssh.add_interface(environment, None if is_alone else interfaces.get(host))
        text = resources.hostfile_text()
        if ssh.is_here(host):
            sessions.append(LocalSession(command, variables, hostfile=text, host=host, prefix_lines=not is_alone))
        else:
            sessions.append(ssh.RemoteSession(shell, command, variables, hostfile=text, host=host))
    return sessions


def show(command: Sequence[str]) -> None:
    """Print the command that is run, without secrets."""
    print(f"launch: {shlex.join(redact(command[1:]))}", flush=True)


def check_hosts(
    flags: LauncherArgs, resources: Resources, shell: ssh.SshShell, words: list[str]
) -> tuple[str, int, dict[str, str]]:
    """Probe and compare all hosts; return address and port of the rendezvous, and host -> interface where known."""
    given_port = flags.given.get("master_port")
    if flags.no_ssh_check and flags.master_addr and given_port:
        return flags.master_addr, given_port, {}
    hosts = [resources.first_host] if flags.no_ssh_check else list(resources.slots)
    answers = ssh.probe_hosts(hosts, shell, ssh.shared_words(words), {"wanted": given_port})
    ssh.compare_hosts(answers, resources.slots)
    first = answers[resources.first_host]
    if not isinstance(first, str) and first["wanted_is_taken"]:
        raise ConfigError(f"{hosts[0]}: {PORT_TAKEN.format(given_port)}")
    address, port = ssh.rendezvous_address(answers, address=flags.master_addr, port=given_port)
    return address, port, ssh.interfaces_between(answers)


def deepspeed() -> list[str]:
    """The `deepspeed` command of this interpreter."""
    script = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(script)] if script.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]


def passed_on(flags: LauncherArgs, *also: str) -> list[str]:
    """The user's own launcher flags, with those of `NOT_PASSED_ON` that `also` names; and a quieter log level."""
    without = {*NOT_PASSED_ON, "module"} - {*also}
    level = "critical" if is_ours(flags) else "error"  # ours says itself how a rank ended
    return flags.typed(without=without) + (
        [] if flags.given.keys() & {"log_level", "quiet"} else [f"--log_level={level}"]
    )


def watch(sessions: Sequence[HostSession], signals: list[int]) -> None:
    """Wait for all hosts; the first of `signals` asks the ranks to save and exit, the second kills them."""
    handled, first_end = 0, None
    while running := [session for session in sessions if session.is_running()]:
        if len(signals) > handled:
            handled += 1
            for session in running:
                session.ask_to_stop() if handled == 1 else session.kill()
        if len(running) < len(sessions):
            first_end = first_end or time.monotonic()
            waited = time.monotonic() - first_end
            for session in running if waited > SECONDS_FOR_OTHER_HOSTS else ():
                session.kill()
                if waited > SECONDS_FOR_OTHER_HOSTS + SECONDS_TO_KILL:
                    session.disconnect()
        time.sleep(POLL_SECONDS)


def outcome(
    reports: Sequence[HostReport], expected: dict[str, int], *, ours: bool, signals: Sequence[int]
) -> tuple[int, Failure | None]:
    """Return the run's exit status and its failure, if any, from the reports of its hosts; `expected`: host -> ranks.

    If the script is ours, a status of 0 counts only if every rank has reported its end: a `deepspeed` command whose
    launcher was killed exits with 0, too.
    """
    if len(signals) > 1:
        return 128 + signals[1], None
    failures = [report.failure for report in reports if report.failure is not None]
    statuses = [report.status for report in reports]
    if failures:
        failure = find_first_failure(failures)
        if failure.kind in ("error", "exception") or failure.signal is not None:
            return failure.status, failure
        of_its_host = [report.status for report in reports if report.host == failure.host]
        status = next(filter(None, [*of_its_host, *statuses]), 1)
        return status, replace(failure, status=status)
    for report in reports:
        if report.status not in (0, stop_requests.EXIT_STOPPED):
            if ours and 2 <= report.status <= StorageError.status:  # a rank has said why in one line
                return report.status, None
            text = f"the deepspeed command on {report.host} ended with status {report.status}, and no rank reported why"
            return report.status, Failure(kind="launcher", host=report.host, status=report.status, error=text)
    if stop_requests.EXIT_STOPPED in statuses:
        return stop_requests.EXIT_STOPPED, None
    for report in reports if ours else ():
        if report.statuses.count(0) < expected.get(report.host, 1):
            text = f"the run on {report.host} is not complete, although the deepspeed command ended with status 0"
            return 1, Failure(kind="launcher", host=report.host, error=text)
    return 0, None


def report_failure(failure: Failure, arguments: Arguments | None) -> None:
    """Print the failure page, after writing the record if the run has a folder and could not write it itself."""
    record = Path(arguments.training["output_dir"]).expanduser() / FAILURE_FILE if arguments else None
    if record and record.parent.is_dir() and failure.kind in ("launcher", "lost"):
        write_failure(record.parent, failure)  # a record that the run has left stays as it is
    if not failure.is_said():
        where = str(record) if record and record.is_file() else ""
        page = format_failure_page(failure, colour=sys.stderr.isatty(), record=where)
        print(f"\n{page}", file=sys.stderr, flush=True)
